"""Save, load into new objects, and continue training. Runs in workers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mesh.checkpoint.content import TrainState
from megatron_mesh.checkpoint.load import Search, load_checkpoint
from megatron_mesh.checkpoint.save import Saver
from megatron_mesh.config.schema import Config
from megatron_mesh.parallel import Stage
from megatron_mesh.runtime.distributed import model_parallel_groups
from megatron_mesh.train.step import train_step
from tests.helpers import tiny_config
from tests.parallel.training import batches_of, build, settings_of


def _train(config: Config, stage: Stage, optimizer: Any, state: TrainState, last: int) -> list[float]:
    losses = []
    while state.step < last:
        batches = batches_of(config, state.step)
        losses.append(train_step(stage, optimizer, state, batches, config.training).loss)
    return losses


def save_and_continue(directory: Path, case: dict[str, Any]) -> list[float]:
    """Train three steps, save, and train three more; return the losses of the last three."""
    config = tiny_config(world_size=dist.get_world_size(), **settings_of(case))
    with model_parallel_groups(config):
        parts = build(config)
        _train(config, *parts, last=3)
        Saver(replace(config, checkpoint=replace(config.checkpoint, save=str(directory)))).save(*parts)
        return _train(config, *parts, last=6)


def load_and_continue(directory: Path, case: dict[str, Any]) -> list[float]:
    """Load the checkpoint of ``save_and_continue`` and train three steps; return their losses."""
    config = tiny_config(world_size=dist.get_world_size(), **settings_of(case))
    config = replace(config, checkpoint=replace(config.checkpoint, load=str(directory)))
    with model_parallel_groups(config):
        parts = build(config)
        found = Search(config.checkpoint).next()
        assert found is not None
        assert load_checkpoint(found, config, *parts) == ""
        return _train(config, *parts, last=6)
