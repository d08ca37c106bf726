"""Training: a resolved configuration goes in; checkpoints, metrics and an exit status come out.

Start reading in ``loop.py``, whose ``pretrain`` runs from the configuration to the last checkpoint;
``step.py`` is one step of it.
"""

from megatron_mesh.checkpoint.content import TrainState
from megatron_mesh.train.loop import pretrain

__all__ = ["TrainState", "pretrain"]
