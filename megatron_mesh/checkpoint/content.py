"""What each rank contributes to a checkpoint: tensors and plain numbers, and nothing that is code."""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import MegatronOptimizer

from megatron_mesh.checkpoint import fp8_state
from megatron_mesh.checkpoint.optimizer_state import sharded_optimizer_state
from megatron_mesh.parallel import Stage
from megatron_mesh.runtime.random import pack_generators


def sharded_state(
    stage: Stage,
    optimizer: MegatronOptimizer | None,
    *,
    with_generators: bool,
    checkpoint: Path | None = None,
) -> ShardedStateDict:
    """This rank's part of a checkpoint, to be written or to be filled.

    Args:
        optimizer: None to leave its state out.
        with_generators: include the state of this rank's random number generators.
        checkpoint: what the result is to be filled from; None if it is to be written.
    """
    weights = stage.sharded_state_dict()
    sharded: ShardedStateDict = {"model": {key: _tensors(part) for key, part in weights.items()}}
    if optimizer is not None:
        bf16 = stage.config.bf16
        sharded["optimizer"] = sharded_optimizer_state(
            optimizer, sharded["model"], bf16=bf16, loading=checkpoint is not None
        )
    if fp8_state.is_kept(stage.config):
        sharded["fp8"] = (
            fp8_state.to_save(weights)
            if checkpoint is None
            else fp8_state.to_fill(weights, checkpoint, stage.config)
        )
    if with_generators:
        place = (0, dist.get_rank(), dist.get_world_size())
        sharded["rng"] = ShardedTensor.from_rank_offsets("rng", pack_generators(), place)
    return sharded


def _tensors(part: dict[str, Any]) -> dict[str, Any]:
    """Without the modules' extra states, which are pickles (see ``fp8_state.py``); local layers have none."""
    return {name: value for name, value in part.items() if not isinstance(value, ShardedObject)}
