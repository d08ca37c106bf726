"""What each rank contributes to a checkpoint: tensors and plain numbers, and nothing that is code."""

from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import MegatronOptimizer

from megatron_mesh.checkpoint.optimizer_state import sharded_optimizer_state
from megatron_mesh.parallel import Stage
from megatron_mesh.runtime.random import pack_generators


def sharded_state(
    stage: Stage, optimizer: MegatronOptimizer | None, *, with_generators: bool, loading: bool = False
) -> ShardedStateDict:
    """This rank's part of a checkpoint, to be written or to be filled.

    Args:
        optimizer: None to leave its state out.
        with_generators: include the state of this rank's random number generators.
        loading: the result is to be filled.
    """
    weights = stage.sharded_state_dict()
    sharded: ShardedStateDict = {"model": {key: _tensors(part) for key, part in weights.items()}}
    if optimizer is not None:
        bf16 = stage.config.bf16
        sharded["optimizer"] = sharded_optimizer_state(
            optimizer, sharded["model"], bf16=bf16, loading=loading
        )
    if with_generators:
        place = (0, dist.get_rank(), dist.get_world_size())
        sharded["rng"] = ShardedTensor.from_rank_offsets("rng", pack_generators(), place)
    return sharded


def _tensors(part: dict[str, Any]) -> dict[str, Any]:
    """Without the modules' extra states: pickles, and empty for the layers that we build."""
    return {name: value for name, value in part.items() if not isinstance(value, ShardedObject)}
