"""Training: the loop, one step of it, the optimizer, and what a run writes.

In: a resolved ``Config``. Out: a trained model in checkpoints, and an exit status. Start with ``loop.py``,
then ``step.py``.
"""

from megatron_mesh.checkpoint.content import TrainState
from megatron_mesh.train.loop import pretrain

__all__ = ["TrainState", "pretrain"]
