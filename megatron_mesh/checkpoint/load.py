"""Loading: which checkpoint is whole, and taking it over on this layout of ranks."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_mesh.checkpoint import fp8_state, integrity
from megatron_mesh.checkpoint.boxes import Box, whole_as_boxes
from megatron_mesh.checkpoint.compatible import schedule_position
from megatron_mesh.checkpoint.content import Content, empty_generators
from megatron_mesh.checkpoint.directory import (
    OLD_FORMAT_VERSION,
    Checkpoint,
    candidates,
    put_back,
    read_checkpoint,
)
from megatron_mesh.checkpoint.index import Index
from megatron_mesh.checkpoint.offline import open_index
from megatron_mesh.checkpoint.reader import Damaged, fill, read_plain
from megatron_mesh.checkpoint.shares import MAIN, set_updates_done, spread, state_key
from megatron_mesh.checkpoint.state import TrainState
from megatron_mesh.config.schema import CheckpointConfig, Config
from megatron_mesh.errors import UserError
from megatron_mesh.parallel import Stage
from megatron_mesh.runtime import phases
from megatron_mesh.runtime.agreement import from_rank_zero, gather_reasons
from megatron_mesh.runtime.random import unpack_generators

logger = logging.getLogger(__name__)

COMMON_FILE = "common.pt"
"""Plain values of format 2."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that a run may start from, as rank 0 has found it."""

    checkpoint: Checkpoint
    index: Index


class Search:
    """The checkpoints that a run may start from, best first. Rank 0 looks, and tells the others.

    Raises:
        UserError: as ``directory.candidates``. Every method is a collective operation, with one outcome.
    """

    def __init__(self, settings: CheckpointConfig):
        self._paths = from_rank_zero(lambda: _candidates(settings))
        self._fallback = settings.load_fallback
        self._first_damage = ""
        self._number = 0

    def next(self, damage: str = "") -> Found | None:
        """The next one whose description and index are whole; None if this run is a new one.

        Args:
            damage: what is wrong with the one before.

        Raises:
            UserError: all are damaged, or the first is and there is no fallback; or a rank does not see it.
        """
        if damage:
            self._note(damage)
        while self._number < len(self._paths):
            path = self._paths[self._number]
            self._number += 1
            found = from_rank_zero(lambda path=path: _open(path))  # type: ignore[misc]
            unseen = None if os.path.isdir(path) else f"the checkpoint {path} is not there"
            if others := gather_reasons(unseen):
                raise UserError(
                    f"{'; '.join(others)}; --load and --save must be on a disk that all nodes share"
                )
            if isinstance(found, str):
                self._note(found)
                continue
            if found.checkpoint.format_version == OLD_FORMAT_VERSION and (found_by_all := _old_damage(path)):
                self._note("; ".join(found_by_all))
                continue
            return found
        if not self._paths:
            return None
        raise UserError(f"{self._first_damage}, and no earlier one is whole; --load another one")

    def _note(self, damage: str) -> None:
        sentence = f"the checkpoint {self._paths[self._number - 1]} is damaged"
        if dist.get_rank() == 0:
            logger.error("%s: %s", sentence, damage)
        self._first_damage = self._first_damage or f"{sentence} ({damage})"
        if not self._fallback:
            raise UserError(
                f"{self._first_damage}, and --no-load-fallback rules out earlier ones; --load another one"
            )


def _candidates(settings: CheckpointConfig) -> list[Path]:
    try:
        if settings.save:
            put_back(Path(settings.save))
        return candidates(settings)
    except OSError as error:
        raise UserError(f"checkpoints cannot be looked for ({error}); check --load and --save") from None


def _open(path: Path) -> Found | str:
    """Read what a checkpoint says of itself and of its tensors; or what is wrong with that, in words."""
    try:
        if found := integrity.damage_before_reading(path):
            return "; ".join(found)
        return Found(read_checkpoint(path), open_index(path))
    except PermissionError as error:  # no damage, so an earlier checkpoint must not take its place
        raise UserError(
            f"{error.filename} may not be read ({error.strerror}); give yourself access"
        ) from None


def _old_damage(path: Path) -> list[str]:
    """Format 2: every file is read by one rank before anything is loaded; a collective operation."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    digests = integrity.read_checksums(path)
    found = integrity.differences(path, digests, read=True, share=rank, shares=ranks)
    return gather_reasons("; ".join(found) or None)


def load_checkpoint(
    found: Found, config: Config, stage: Stage, optimizer: MegatronOptimizer, state: TrainState
) -> str:
    """Take over a checkpoint of the same model (see ``check_same_run``); a collective operation.

    As in Megatron-LM: ``finetune`` takes the weights alone; without ``load_optim`` the optimizer and the
    schedule start anew at the checkpoint's step; the generators are left as they are without ``load_rng``,
    or if the layout of ranks differs.

    Returns:
        What any rank found damaged, after which the state of the parts is undefined; "" if all is well.
    """
    phases.enter("loading a checkpoint")
    settings, checkpoint = config.checkpoint, found.checkpoint
    with_optimizer = settings.load_optim and not settings.finetune
    with_generators = settings.load_rng and not settings.finetune
    if with_generators and not checkpoint.same_layout(config, dist.get_world_size()):
        logger.info("the random number generators start anew: the checkpoint is of another layout of ranks")
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
        logger.info("starts from the weights of %s", checkpoint.path)
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
    """Take over the tensors of a checkpoint; a collective operation.

    Args:
        index: of the checkpoint.
        stage: gets the weights, and the state of FP8.
        optimizer: gets main parameters; its moments only ``with_optimizer``. None if there is none.
        with_optimizer: read the optimizer's state, not the weights alone.
        with_generators: also the state of random number generators, of as many ranks.

    Returns:
        What any rank found damaged, after which the state of the parts is undefined; "" if all is well.
    """
    content = Content(stage, optimizer)
    states = fp8_state.to_fill(content.weights, index, stage.config)
    packed: list[Box] = []

    def read() -> None:
        boxes = list(content.to_read(with_optimizer=with_optimizer))
        if with_optimizer:
            boxes = [_most_precise(box, index) for box in boxes]
        boxes += [box for tensor in states.values() for box in whole_as_boxes(tensor)]
        if with_generators:
            packed.append(empty_generators(index))
        fill(index, boxes + packed)

    if damage := gather_reasons(_damage_found_by(read)):
        return "; ".join(damage)
    spread(stage, optimizer, content.shares, with_optimizer=with_optimizer)
    for chunk, extra in fp8_state.extra_states(states, stage.config).items():
        stage.modules[int(chunk)].load_state_dict(extra, strict=False)
    for box in packed:
        unpack_generators(box.data)
    return ""


def _most_precise(box: Box, index: Index) -> Box:
    """A float32 weight comes from the main parameter, where the checkpoint has the weight in bfloat16.

    Weights that are in float32 today may have been in bfloat16 (``Scheme.full_precision``).
    """
    main = state_key(MAIN, box.key)
    return replace(box, key=main) if box.data.dtype == torch.float32 and main in index.entries else box


def _damage_found_by(work: Callable[[], object]) -> str | None:
    """Why ``work`` cannot be done, if the checkpoint is to blame."""
    try:
        work()
    except Damaged as error:
        return str(error)
    return None


def updates_of(checkpoint: Checkpoint) -> int:
    """How many updates Adam counts."""
    if checkpoint.format_version != OLD_FORMAT_VERSION:
        return checkpoint.updates
    saved = read_plain(checkpoint.path / COMMON_FILE)["optimizer"]
    inner = saved.get("optimizer", saved)
    if "common_step" in inner.get("state", {}):
        return int(inner["state"]["common_step"])
    return int(inner["param_groups"][0]["step"])
