"""Bytes, memory and seconds of each rank while checkpoints are saved, loaded and copied."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from megatron_mesh.bench.checkpoints import in_turn
from megatron_mesh.bench.counting import Counts, counted
from megatron_mesh.bench.launch import progress
from megatron_mesh.checkpoint.load import Search, load_checkpoint
from megatron_mesh.checkpoint.save import Saved, Saver
from megatron_mesh.checkpoint.shares import MOMENTS, allocate, only_member
from megatron_mesh.checkpoint.state import TrainState
from megatron_mesh.checkpoint.writer import file_of
from megatron_mesh.config.checks import resolve
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import with_values
from megatron_mesh.parallel import Stage, build_stage
from megatron_mesh.planner.text import size
from megatron_mesh.runtime.distributed import is_rank_zero, model_parallel_groups
from megatron_mesh.runtime.run_files import CHECKPOINTS
from megatron_mesh.train.optimizer import build_optimizer, build_schedule

SAVE, BACKGROUND, COPY = "save", "save in the background", "copy of its file"
LOAD, LOAD_OTHER = "load, same layout", "load, another layout"
KINDS = (SAVE, BACKGROUND, COPY, LOAD, LOAD_OTHER)


@dataclass(frozen=True)
class Figures:
    """What one rank did in one operation. Sizes are in bytes."""

    kind: str
    seconds: float
    stall_seconds: float
    """The part of it in which training would have waited."""
    written: int = 0
    read: int = 0
    memory: int = 0
    """This and the following are as in ``Counts``."""
    sent: int = 0
    received: int = 0
    opened: int = 0


@dataclass
class Run:
    """Everything that a checkpoint holds, with the optimizer's whole state; not a step was trained."""

    config: Config
    stage: Stage
    optimizer: Any
    state: TrainState

    def save(self, directory: Path, *, background: bool = False) -> tuple[Counts, Saved]:
        """Save to ``directory``; a collective operation. A save in the background has nothing beside it."""
        saved: list[Saved] = []
        self.state.advance(1)  # a step is saved once
        settings = replace(self.config.checkpoint, save=str(directory), async_save=background)
        saver = Saver(replace(self.config, checkpoint=settings), saved.append)
        dist.barrier()
        with counted(directory) as counts:
            saver.save(self.stage, self.optimizer, self.state)
            while not saver.written():
                time.sleep(0.005)
            saver.finish()
        assert saved, "the save failed; the log says why"
        return counts, saved[0]

    def load(self, checkpoint: Path) -> Counts:
        """Load ``checkpoint``; a collective operation."""
        settings = replace(self.config.checkpoint, load=str(checkpoint), save=None)
        dist.barrier()
        with counted(checkpoint) as counts:
            found = Search(settings).next()
            assert found is not None
            damage = load_checkpoint(found, self.config, self.stage, self.optimizer, self.state)
        assert not damage, damage
        return counts


def build(config: Config) -> Run:
    """Build a run on this rank. Megatron's groups must exist."""
    stage = build_stage(config)
    optimizer = build_optimizer(config, stage)
    allocate(optimizer)
    for state in only_member(optimizer).optimizer.state.values():
        for name in MOMENTS:  # memory that nothing was written to is not resident
            state[name].uniform_()
    return Run(config, stage, optimizer, TrainState(build_schedule(config.optimizer, optimizer)))


def measure(config: Config, directory: Path, rounds: int) -> list[Figures]:
    """Save in both ways, load and copy in turn, then load on another layout; in the ranks of a new world."""
    with model_parallel_groups(config):
        found = _save_and_load(config, directory, rounds)
    other = other_layout(config, dist.get_world_size())
    if other is not None:
        with model_parallel_groups(other):
            found += _load(other, directory, rounds)
    return found


def _save_and_load(config: Config, directory: Path, rounds: int) -> list[Figures]:
    """One checkpoint stays."""
    run, found, copies = build(config), [], directory / "copy"
    kept = run.save(directory)[1].path

    def save(kind: str) -> Path:
        counts, saved = run.save(directory, background=kind == BACKGROUND)
        found.append(_figures(kind, counts, saved.path, saved.stall_seconds))
        return saved.path

    def copy() -> Path:
        found.append(_copy(kept, copies))
        return copies

    writes: list[Callable[[], Path]] = [partial(save, SAVE), partial(save, BACKGROUND), copy]
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}: saving and copying")
        for write in in_turn(writes, number):
            _remove(write())
        progress(f"round {number + 1} of {rounds}: loading")
        found.append(_figures(LOAD, run.load(kept), kept))
    return found


def _remove(path: Path) -> None:
    """Remove a directory that all ranks are through with."""
    dist.barrier()
    if is_rank_zero():
        shutil.rmtree(path)
    dist.barrier()


def _load(config: Config, directory: Path, rounds: int) -> list[Figures]:
    """Load the one checkpoint in ``directory``."""
    run, (checkpoint,) = build(config), list(directory.glob(CHECKPOINTS))
    found = []
    for number in range(1, rounds + 1):
        progress(f"another layout, round {number} of {rounds}: loading")
        found.append(_figures(LOAD_OTHER, run.load(checkpoint), checkpoint))
    return found


def _figures(kind: str, counts: Counts, checkpoint: Path, stall: float | None = None) -> Figures:
    return Figures(
        kind,
        counts.seconds,
        counts.seconds if stall is None else stall,
        counts.written(checkpoint),
        counts.read(checkpoint),
        counts.memory,
        counts.sent,
        counts.received,
        counts.opened,
    )


def _copy(checkpoint: Path, copies: Path) -> Figures:
    """Copy this rank's file, with fsync, while the other ranks copy theirs."""
    copies.mkdir(exist_ok=True)
    source = checkpoint / file_of(dist.get_rank())
    dist.barrier()
    start = time.perf_counter()
    copy = shutil.copyfile(source, copies / source.name)
    with open(copy, "rb") as file:
        os.fsync(file.fileno())
    seconds, size = time.perf_counter() - start, copy.stat().st_size
    return Figures(COPY, seconds, seconds, written=size, read=size)


def other_layout(config: Config, ranks: int) -> Config | None:
    """The same model on as many ranks, with tensor parallelism or, if it has that, without; None if odd."""
    parallel, training = config.parallel, config.training
    if ranks % 2:
        return None
    tensor = 2 if parallel.tensor_model_parallel_size == 1 else 1
    pipelined = parallel.pipeline_model_parallel_size
    if ranks % (tensor * pipelined):
        pipelined = 1
    values = {
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": False,
        "pipeline_model_parallel_size": pipelined,
        "global_batch_size": training.micro_batch_size * ranks,  # of no step
    }
    return resolve(with_values(config, values), world_size=ranks)


def summary(by_rank: list[list[Figures]]) -> list[list[str]]:
    """A table with a line for each operation and rank: median seconds, and the most bytes of any round."""
    head = ["", "rank", "seconds", "waiting", "written", "read", "memory", "sent", "received", "files opened"]
    rows = [head]
    for kind in KINDS:
        for rank, every in enumerate(by_rank):
            chosen = [figures for figures in every if figures.kind == kind]
            if not chosen:
                continue
            seconds = [median(getattr(f, name) for f in chosen) for name in ("seconds", "stall_seconds")]
            names = ("written", "read", "memory", "sent", "received")
            sizes = [size(max(getattr(f, name) for f in chosen)) for name in names]
            opened = str(max(f.opened for f in chosen))
            rows.append([kind, str(rank), *(f"{each:.2f}" for each in seconds), *sizes, opened])
    return rows
