"""The state of a run besides weights and optimizer, in one object, so that saving forgets nothing.

Lists what a rank writes to a checkpoint and what it reads from one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mesh.checkpoint import fp8_state
from megatron_mesh.checkpoint.index import Box, Index, tensor_as_boxes
from megatron_mesh.checkpoint.reader import Damaged
from megatron_mesh.checkpoint.shares import Share, build_shares
from megatron_mesh.parallel import Stage
from megatron_mesh.runtime.device import pack_generators


@dataclass
class TrainState:
    """The progress of a run, equal on all ranks. Random number generators are in ``runtime/device.py``."""

    schedule: OptimizerParamScheduler
    step: int = 0
    """Number of steps done, including skipped ones."""
    consumed_samples: int = 0
    """Number of sequences that all ranks have read: the position in the data."""
    train_loss: float | None = None
    """Loss per token at step ``train_loss_step``, the last logged one."""
    train_loss_step: int | None = None
    valid_loss: float | None = None
    """Loss per token of the last validation, at step ``valid_loss_step``."""
    valid_loss_step: int | None = None
    fingerprints: dict[str, str] | None = None
    """Digests of each stream's data and order (``SampleStream.order``), and of the tokenizer."""
    skipped: int = 0
    """Number of steps in a row, up to now, that were skipped because loss or gradients were not finite."""

    def advance(self, samples: int, *, schedule_in_samples: bool = False) -> None:
        """Count a step over ``samples`` sequences, and set the learning rate of the next step."""
        self.step += 1
        self.consumed_samples += samples
        self.schedule.step(samples if schedule_in_samples else 1)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "train_loss": self.train_loss,
            "train_loss_step": self.train_loss_step,
            "valid_loss": self.valid_loss,
            "valid_loss_step": self.valid_loss_step,
            "fingerprints": self.fingerprints,
            "skipped": self.skipped,
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any], schedule_position: int) -> None:
        """Restore the result of ``state_dict``, and move the new schedule to ``schedule_position``."""
        self.step = saved["step"]
        self.consumed_samples = saved["consumed_samples"]
        self.train_loss, self.train_loss_step = saved["train_loss"], saved.get("train_loss_step")
        self.valid_loss, self.valid_loss_step = saved["valid_loss"], saved.get("valid_loss_step")
        self.skipped = saved.get("skipped", 0)
        self.fingerprints = saved.get("fingerprints")
        self.schedule.step(schedule_position)


GENERATORS = "rng"
"""Key of the random number generators' states of all ranks, concatenated."""
NOT_WEIGHTS = ("optimizer.", GENERATORS)
"""Key prefixes of everything that is not a weight."""


class Content:
    """This rank's part of a checkpoint, as boxes that are views of the rank's tensors.

    Args:
        stage: this rank's part of the model.
        optimizer: None for weights only.
    """

    def __init__(self, stage: Stage, optimizer: MegatronOptimizer | None):
        self.stage, self.optimizer = stage, optimizer
        self.weights = stage.sharded_state_dict()
        held = {id(p) for module in stage.modules for p in module.parameters()}
        tensors = list(_tensors(self.weights))
        self.shares: Sequence[Share] = build_shares(optimizer, [t for t in tensors if id(t.data) in held])
        self._buffers = [tensor for tensor in tensors if id(tensor.data) not in held]

    def to_write(self) -> Iterator[Box]:
        """Yield everything that this rank writes, including the state of its random number generators."""
        for share in self.shares:
            yield from share.to_write()
        states = fp8_state.to_save(self.weights, self.stage.config)
        for tensor in (*self._buffers, *states.values()):
            if not any(tensor.replica_id):
                yield from tensor_as_boxes(tensor)
        yield generators(pack_generators())

    def to_read(self, *, with_optimizer: bool) -> Iterator[Box]:
        """Yield the weights that this rank reads and, if wanted, the optimizer's state."""
        for share in self.shares:
            yield from share.to_read(with_optimizer=with_optimizer)
        for tensor in self._buffers:
            yield from tensor_as_boxes(tensor)


def generators(packed: torch.Tensor) -> Box:
    """Return the box of this rank's random number generators."""
    rank, length = dist.get_rank(), len(packed)
    return Box(GENERATORS, (length * dist.get_world_size(),), (rank * length,), packed)


def empty_generators(index: Index) -> Box:
    """Return an empty box to read them into, from a checkpoint with the same number of ranks."""
    if GENERATORS not in index.entries:
        raise Damaged("it has no random number generator states")
    length = index.entries[GENERATORS].shape[0] // dist.get_world_size()
    return generators(torch.empty(length, dtype=torch.uint8))


def _tensors(weights: dict[str, dict[str, Any]]) -> Iterator[ShardedTensor]:
    """Yield all tensors, without the modules' extra states, which are pickles (see ``fp8_state.py``)."""
    for part in weights.values():
        yield from (value for value in part.values() if isinstance(value, ShardedTensor))
