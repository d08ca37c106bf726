"""Loading: which checkpoint is whole, and taking it over on this layout of ranks."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_mesh.checkpoint import fp8_state, integrity, safe
from megatron_mesh.checkpoint.content import sharded_state
from megatron_mesh.checkpoint.directory import Checkpoint, read_checkpoint
from megatron_mesh.checkpoint.optimizer_state import load_optimizer_state
from megatron_mesh.checkpoint.state import TrainState
from megatron_mesh.config.schema import Config
from megatron_mesh.errors import UserError
from megatron_mesh.parallel import Stage
from megatron_mesh.runtime.random import unpack_generators

logger = logging.getLogger(__name__)


def first_whole(paths: Sequence[Path], *, fallback: bool) -> Checkpoint | None:
    """The first checkpoint that is not damaged; None if there are no checkpoints. A collective operation.

    Raises:
        UserError: all of them are damaged, or the first is and there is no ``fallback``.
    """
    box = [paths]
    dist.broadcast_object_list(box, src=0)  # ranks on other nodes may see the directory later
    paths, damage = box[0], []
    for path in paths:
        damage.append("; ".join(integrity.damage_seen_by_all(path)))
        if not damage[-1]:
            return read_checkpoint(path)
        if dist.get_rank() == 0:
            logger.error("the checkpoint %s is damaged: %s", path, damage[-1])
        if not fallback:
            break
    if not paths:
        return None
    raise UserError(
        f"the checkpoint {paths[0]} is damaged ({damage[0]}), and "
        + ("no earlier one is whole" if fallback else "--no-load-fallback rules out earlier ones")
        + "; --load another one"
    )


def load_checkpoint(
    checkpoint: Checkpoint, config: Config, stage: Stage, optimizer: MegatronOptimizer, state: TrainState
) -> None:
    """Take over a checkpoint of the same model (see ``check_same_run``); a collective operation.

    As in Megatron-LM: ``finetune`` takes the weights alone; without ``load_optim`` the optimizer and the
    schedule start anew at the checkpoint's step; the generators are left as they are without ``load_rng``,
    or if the layout of the ranks is another.
    """
    settings = config.checkpoint
    with_optimizer = settings.load_optim and not settings.finetune
    with_generators = settings.load_rng and not settings.finetune
    if with_generators and not checkpoint.same_layout(config, dist.get_world_size()):
        logger.info("the random number generators start anew: the checkpoint is of another layout of ranks")
        with_generators = False
    sharded = sharded_state(
        stage,
        optimizer if with_optimizer else None,
        with_generators=with_generators,
        checkpoint=checkpoint.path,
    )
    loaded = safe.load(sharded, checkpoint.path)
    fp8_state.put_back(loaded["model"], loaded.get("fp8", {}), stage.config)
    stage.load_state_dict(loaded["model"])
    if with_optimizer:
        _load_optimizer(optimizer, loaded["optimizer"], config)
    else:
        optimizer.reload_model_params()
    if not settings.finetune:
        state.load_state_dict(checkpoint.train_state, with_schedule=with_optimizer)
    if with_generators:
        unpack_generators(loaded["rng"])
    logger.info("loaded %s", checkpoint.path)


def _load_optimizer(optimizer: MegatronOptimizer, saved: dict[str, Any], config: Config) -> None:
    load_optimizer_state(optimizer, saved)
    # The groups come with the checkpoint's settings, which the schedule would prefer to its own.
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = config.optimizer.lr, config.optimizer.min_lr
