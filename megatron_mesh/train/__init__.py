"""Training: the loop, one step of it, optimizer and schedule, checkpoints, what is measured and written."""

from megatron_mesh.train.loop import pretrain
from megatron_mesh.train.state import TrainState

__all__ = ["TrainState", "pretrain"]
