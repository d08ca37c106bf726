"""Training: the loop, one step of it, optimizer and schedule, checkpoints, what is measured and written."""

from megatron_mesh.checkpoint.state import TrainState
from megatron_mesh.train.loop import pretrain

__all__ = ["TrainState", "pretrain"]
