"""Checkpoints on disk, in Megatron-core's torch_dist format, which any layout of ranks can read.

``SAVE/iter_0000020/`` holds the weights, the optimizer and every rank's generators (Megatron-core's files),
``config.yaml`` and ``state.json``. It gets its name only when it is complete, and only then is it named in
``SAVE/latest_checkpointed_iteration.txt`` (Megatron-LM's file).
"""

import json
import logging
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_core_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.optimizer import MegatronOptimizer

from megatron_mesh import __version__
from megatron_mesh.config.dump import dump_config
from megatron_mesh.config.schema import Config
from megatron_mesh.parallel import Stage
from megatron_mesh.train.distributed_optimizer import CHECKPOINT_METADATA, prepare_loading
from megatron_mesh.train.resume import CONFIG_FILE, FORMAT_VERSION, STATE_FILE, TRACKER_FILE, Checkpoint
from megatron_mesh.train.state import TrainState, rng_state, set_rng_state

logger = logging.getLogger(__name__)


def save_checkpoint(
    directory: Path,
    config: Config,
    stage: Stage,
    optimizer: MegatronOptimizer,
    state: TrainState,
) -> Path:
    """Write the run's state as ``directory/iter_<step>``; a collective operation. Returns that path."""
    final = directory / f"iter_{state.step:07d}"
    partial = directory / f"{final.name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
        partial.mkdir(parents=True)
    dist.barrier()
    with _without_notes(), stage.parameters_gathered():
        sharded = _sharded_state(stage, optimizer, with_rng=True)
        dist_checkpointing.save(sharded, str(partial))
    if dist.get_rank() == 0:
        (partial / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
        (partial / STATE_FILE).write_text(json.dumps(_description(state), indent=2), encoding="utf-8")
        _publish(partial, final, state.step)
    dist.barrier()
    logger.info("saved %s", final)
    return final


@contextmanager
def _without_notes() -> Iterator[None]:
    """Keep back what torch tells Megatron-core's authors of names that it will drop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _publish(partial: Path, final: Path, step: int) -> None:
    """Give a complete checkpoint its name, then name it in the tracker file; each at one stroke."""
    # A step that this run does again, after it resumed from an earlier one: the tracker did not name it.
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    tracker = final.parent / TRACKER_FILE
    temporary = tracker.with_suffix(".partial")
    temporary.write_text(str(step), encoding="utf-8")
    os.replace(temporary, tracker)


def _description(state: TrainState) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "world_size": dist.get_world_size(),
        "versions": {
            "megatron_mesh": __version__,
            "megatron_core": megatron_core_version,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "train_state": state.state_dict(),
    }


def _sharded_state(
    stage: Stage,
    optimizer: MegatronOptimizer | None,
    *,
    with_rng: bool,
    loading: bool = False,
) -> dict[str, Any]:
    """What this rank contributes to a checkpoint, or takes from one."""
    weights = stage.sharded_state_dict()
    sharded: dict[str, Any] = {"model": weights}
    if optimizer is not None:
        if loading:
            prepare_loading(optimizer)
        sharded["optimizer"] = optimizer.sharded_state_dict(
            weights, is_loading=loading, metadata=CHECKPOINT_METADATA
        )
    if with_rng:
        sharded["rng"] = ShardedObject("rng", rng_state(), (dist.get_world_size(),), (dist.get_rank(),))
    return sharded


def load_checkpoint(
    checkpoint: Checkpoint,
    config: Config,
    stage: Stage,
    optimizer: MegatronOptimizer,
    state: TrainState,
) -> None:
    """Take over a checkpoint of the same model (see ``resume.check_same_run``); a collective operation.

    As in Megatron-LM: ``finetune`` takes the weights alone; without ``load_optim`` the optimizer and the
    schedule start anew at the checkpoint's step; the generators are left as they are without ``load_rng``,
    or if the layout of the ranks is another.
    """
    settings = config.checkpoint
    with_optimizer = settings.load_optim and not settings.finetune
    with_rng = settings.load_rng and not settings.finetune
    if with_rng and not checkpoint.same_layout(config, dist.get_world_size()):
        logger.info("the random number generators start anew: the checkpoint is of another layout of ranks")
        with_rng = False
    sharded = _sharded_state(stage, optimizer if with_optimizer else None, with_rng=with_rng, loading=True)
    with _without_notes():
        loaded = dist_checkpointing.load(sharded, str(checkpoint.path))
    stage.load_state_dict(loaded["model"])
    if with_optimizer:
        _load_optimizer(optimizer, loaded["optimizer"], config)
    else:
        optimizer.reload_model_params()
    if not settings.finetune:
        state.load_state_dict(checkpoint.train_state, with_schedule=with_optimizer)
    if with_rng:
        set_rng_state(loaded["rng"])
    logger.info("loaded %s", checkpoint.path)


def _load_optimizer(optimizer: MegatronOptimizer, saved: dict[str, Any], config: Config) -> None:
    optimizer.load_state_dict(saved)
    # The groups come with the checkpoint's settings, which the schedule would prefer to its own.
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = config.optimizer.lr, config.optimizer.min_lr
