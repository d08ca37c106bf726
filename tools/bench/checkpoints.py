"""How long checkpoints hold training up, and how fast they are written and read, beside a plain copy."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

from megatron_mesh.bench.clock import now
from megatron_mesh.bench.variants import random_batches
from megatron_mesh.checkpoint import integrity
from megatron_mesh.checkpoint.load import Search, load_checkpoint
from megatron_mesh.checkpoint.save import Saved, Saver
from megatron_mesh.checkpoint.state import TrainState
from megatron_mesh.config.schema import Config
from megatron_mesh.parallel import Stage, build_stage
from megatron_mesh.train.optimizer import build_optimizer, build_schedule
from megatron_mesh.train.step import train_step
from megatron_mesh.train.vote import Outcome, Vote

_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class Figures:
    """Medians over the rounds; of one process."""

    gigabytes: float
    step_seconds: float
    sync_seconds: float
    async_seconds: float
    """From the start of a background save to its publication."""
    async_stall_seconds: float
    """The part of it in which training waits."""
    load_seconds: float
    """Checksums of all files, and taking the state over."""
    copy_seconds: float
    """A copy of the same files in the same directory, with fsync. It follows a training step, as saves do."""


def measure(config: Config, directory: Path, rounds: int) -> Figures:
    """Save in the foreground, in the background, copy and load in turn. Megatron's groups must exist."""
    stage = build_stage(config)
    optimizer = build_optimizer(config, stage)
    state = TrainState(build_schedule(config.optimizer, optimizer))
    batches = random_batches(
        config.training.global_batch_size or 1,
        config.training.micro_batch_size,
        config.model.seq_length,
        config.model.vocab_size or 1,
        config.training.seed,
    )
    times: dict[str, list[float]] = {name: [] for name in ("step", "sync", "async", "stall", "load", "copy")}

    def step(written: bool = True) -> Outcome:
        vote = partial(Vote, written=written)
        return train_step(stage, optimizer, state, iter(batches), config.training, vote=vote)

    def save(background: bool) -> Saved:
        return _save(config, directory, (stage, optimizer, state), step, background=background)

    def copy() -> None:
        step()  # as before a save: memory for files may be slower to get after a step
        times["copy"].append(_seconds(lambda: _copy(kept, directory / "copy")))
        shutil.rmtree(directory / "copy")

    def save_and_remove(background: bool) -> None:
        saved = save(background)
        times["async" if background else "sync"].append(saved.seconds)
        if background:
            times["stall"].append(saved.stall_seconds)
        shutil.rmtree(saved.path)

    step()
    kept = save(background=False).path
    writes: list[Callable[[], None]] = [partial(save_and_remove, False), partial(save_and_remove, True), copy]
    for number in range(rounds):
        times["step"].append(_seconds(step))
        for write in in_turn(writes, number):
            write()
        times["load"].append(_seconds(lambda: _load(config, kept, stage, optimizer, state)))
    size = sum(file.stat().st_size for file in kept.iterdir())
    shutil.rmtree(kept)
    middle = {name: median(values) for name, values in times.items()}
    return Figures(
        size / 1e9,
        middle["step"],
        middle["sync"],
        middle["async"],
        middle["stall"],
        middle["load"],
        middle["copy"],
    )


def in_turn(kinds: Sequence[_Kind], number: int) -> list[_Kind]:
    """All ``kinds``, with a different one first in each round.

    A disk may take the first gigabytes faster than those that follow.
    """
    first = number % len(kinds)
    return [*kinds[first:], *kinds[:first]]


def _save(
    config: Config, directory: Path, parts: tuple, step: Callable[..., Outcome], *, background: bool = False
) -> Saved:
    saved: list[Saved] = []
    settings = replace(config.checkpoint, save=str(directory), async_save=background)
    saver = Saver(replace(config, checkpoint=settings), saved.append)
    step()
    saver.save(*parts)
    while saver.pending:  # training continues in the meantime
        if step(saver.written()).all_written:
            saver.complete()
    return saved[0]


def _load(config: Config, path: Path, stage: Stage, optimizer: object, state: TrainState) -> None:
    found = Search(replace(config.checkpoint, load=str(path), save=None)).next()
    assert found is not None
    load_checkpoint(found, config, stage, optimizer, state)


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in (*integrity.files(source), source / integrity.CHECKSUMS_FILE):
        copy = shutil.copyfile(file, target / file.name)
        with open(copy, "rb") as handle:
            os.fsync(handle.fileno())


def _seconds(work: Callable[[], object]) -> float:
    start = now()
    work()
    return now() - start
