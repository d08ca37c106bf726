"""Loading: finds an intact checkpoint and reads it into a run, on the same rank layout or on another."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_mesh.checkpoint import fp8_state, integrity
from megatron_mesh.checkpoint.compatible import schedule_position
from megatron_mesh.checkpoint.content import Content, TrainState, empty_generators
from megatron_mesh.checkpoint.directory import (
    OLD_FORMAT_VERSION,
    Checkpoint,
    candidates,
    read_checkpoint,
    restore_replaced,
)
from megatron_mesh.checkpoint.index import Box, Index, tensor_as_boxes
from megatron_mesh.checkpoint.offline import open_index
from megatron_mesh.checkpoint.reader import Damaged, fill, read_values
from megatron_mesh.checkpoint.shares import MAIN, complete_parameters, set_updates_done, state_key
from megatron_mesh.config.schema import CheckpointConfig, Config
from megatron_mesh.errors import UserError
from megatron_mesh.parallel import Stage
from megatron_mesh.runtime import phases
from megatron_mesh.runtime.device import unpack_generators
from megatron_mesh.runtime.distributed import from_rank_zero, gather_reasons

logger = logging.getLogger(__name__)

COMMON_FILE = "common.pt"
"""The file with the plain values of format 2."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that a run may load, as rank 0 has read it."""

    checkpoint: Checkpoint
    index: Index


class Search:
    """Goes through the checkpoints that a run may load, in the order of preference.

    Rank 0 looks for them and broadcasts what it finds. Construction and ``next`` are collective operations
    with the same result, or the same exception, on all ranks.

    Raises:
        UserError: see ``directory.candidates``.
    """

    def __init__(self, settings: CheckpointConfig):
        self._paths = from_rank_zero(lambda: _candidates(settings))
        self._fallback = settings.load_fallback
        self._first_damage = ""
        self._number = 0

    def next(self, damage: str = "") -> Found | None:
        """Return the next checkpoint whose description and index are intact; None if this is a new run.

        Args:
            damage: what is wrong with the checkpoint that the previous call returned.

        Raises:
            UserError: all are damaged, or the first one is and --no-load-fallback is given, or not every rank
                sees the checkpoint.
        """
        if damage:
            self._record_damage(damage)
        while self._number < len(self._paths):
            path = self._paths[self._number]
            self._number += 1
            found = from_rank_zero(lambda path=path: _open(path))  # type: ignore[misc]
            unseen = None if os.path.isdir(path) else f"the checkpoint {path} does not exist here"
            if others := gather_reasons(unseen):
                raise UserError(
                    f"{'; '.join(others)}; put --load and --save on a file system that all nodes share"
                )
            if isinstance(found, str):
                self._record_damage(found)
                continue
            if found.checkpoint.format_version == OLD_FORMAT_VERSION and (found_by_all := _old_damage(path)):
                self._record_damage("; ".join(found_by_all))
                continue
            return found
        if not self._paths:
            return None
        raise UserError(f"{self._first_damage}, and no earlier one is intact; --load another one")

    def _record_damage(self, damage: str) -> None:
        sentence = f"the checkpoint {self._paths[self._number - 1]} is damaged"
        if dist.get_rank() == 0:
            more = self._fallback and self._number < len(self._paths)
            logger.error("%s: %s%s", sentence, damage, "; trying the one before it" if more else "")
        self._first_damage = self._first_damage or f"{sentence} ({damage})"
        if not self._fallback:
            raise UserError(
                f"{self._first_damage}; leave out --no-load-fallback to use an earlier one, or --load "
                "another one"
            )


def _candidates(settings: CheckpointConfig) -> list[Path]:
    try:
        if settings.save:
            restore_replaced(Path(settings.save))
        return candidates(settings)
    except OSError as error:
        raise UserError(f"cannot list the checkpoints ({error}); check --load and --save") from None


def _open(path: Path) -> Found | str:
    """Read a checkpoint's description and index. If they are damaged, return the damage in words instead."""
    try:
        if found := integrity.find_cheap_damage(path):
            return "; ".join(found)
        return Found(read_checkpoint(path), open_index(path))
    except PermissionError as error:  # not damage, so don't fall back to an earlier checkpoint
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); give yourself permission"
        ) from None


def _old_damage(path: Path) -> list[str]:
    """Verify a checkpoint of format 2: each rank reads some of its files. A collective operation."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    digests = integrity.read_checksums(path)
    found = integrity.find_differences(path, digests, read=True, share=rank, shares=ranks)
    return gather_reasons("; ".join(found) or None)


def load_checkpoint(
    found: Found, config: Config, stage: Stage, optimizer: MegatronOptimizer, state: TrainState
) -> str:
    """Load a checkpoint of the same model (see ``check_same_run``). A collective operation.

    As in Megatron-LM, ``finetune`` loads only the weights. Without ``load_optim`` the optimizer and the
    schedule restart at the checkpoint's step. Without ``load_rng``, or on another rank layout, the random
    number generators are not restored.

    Returns:
        The damage that any rank found, or "". After damage, the state of model and optimizer is undefined.
    """
    phases.enter("loading a checkpoint")
    settings, checkpoint = config.checkpoint, found.checkpoint
    with_optimizer = settings.load_optim and not settings.finetune
    with_generators = settings.load_rng and not settings.finetune
    if with_generators and not checkpoint.same_layout(config, dist.get_world_size()):
        logger.info(
            "the random number generators restart from --seed: the checkpoint is from another rank layout"
        )
        with_generators = False
    damage = load_tensors(
        found.index,
        stage,
        optimizer,
        with_optimizer=with_optimizer,
        with_generators=with_generators,
    )
    if damage:
        return damage
    if with_optimizer:
        set_updates_done(optimizer, updates_of(checkpoint))
    if not settings.finetune:
        position = schedule_position(checkpoint, config) if with_optimizer else 0
        state.load_state_dict(checkpoint.train_state, position)
    if settings.finetune:
        logger.info("started a new run from the weights of %s", checkpoint.path)
    else:
        logger.info("resumed at step %d from %s", state.step, checkpoint.path)
    return ""


def load_tensors(
    index: Index,
    stage: Stage,
    optimizer: MegatronOptimizer | None,
    *,
    with_optimizer: bool = False,
    with_generators: bool = False,
) -> str:
    """Load the tensors of a checkpoint. A collective operation.

    Args:
        index: the index of the checkpoint.
        stage: receives the weights and the FP8 state.
        optimizer: receives the main parameters and, ``with_optimizer``, the moments. None if there is none.
        with_optimizer: also load the optimizer's state.
        with_generators: also load the random number generators' states; needs the same number of ranks.

    Returns:
        The damage that any rank found, or "". After damage, the state of model and optimizer is undefined.
    """
    content = Content(stage, optimizer)
    states = fp8_state.to_fill(content.weights, index, stage.config)
    packed: list[Box] = []

    def read() -> None:
        boxes = list(content.to_read(with_optimizer=with_optimizer))
        if with_optimizer:
            boxes = [_most_precise(box, index) for box in boxes]
        boxes += [box for tensor in states.values() for box in tensor_as_boxes(tensor)]
        if with_generators:
            packed.append(empty_generators(index))
        fill(index, boxes + packed)

    if damage := gather_reasons(_damage_found_by(read)):
        return "; ".join(damage)
    complete_parameters(stage, optimizer, content.shares, with_optimizer=with_optimizer)
    for chunk, extra in fp8_state.extra_states(states, stage.config).items():
        stage.modules[int(chunk)].load_state_dict(extra, strict=False)
    for box in packed:
        unpack_generators(box.data)
    return ""


def _most_precise(box: Box, index: Index) -> Box:
    """For a float32 weight, read the main parameter if the checkpoint has one.

    Otherwise the value would be rounded: some weights that are float32 now (``Scheme.full_precision``) were
    bfloat16 in older checkpoints.
    """
    main = state_key(MAIN, box.key)
    return replace(box, key=main) if box.data.dtype == torch.float32 and main in index.entries else box


def _damage_found_by(work: Callable[[], object]) -> str | None:
    """Do ``work``; return the damage of the checkpoint that it ran into, or None."""
    try:
        work()
    except Damaged as error:
        return str(error)
    return None


def updates_of(checkpoint: Checkpoint) -> int:
    """Return how many updates Adam had counted when the checkpoint was saved."""
    if checkpoint.format_version != OLD_FORMAT_VERSION:
        return checkpoint.updates
    saved = read_values(checkpoint.path / COMMON_FILE)["optimizer"]
    inner = saved.get("optimizer", saved)
    if "common_step" in inner.get("state", {}):
        return int(inner["state"]["common_step"])
    return int(inner["param_groups"][0]["step"])
