"""Count what each rank does while checkpoints are saved, loaded and copied.

``checkpoints.py --ranks N`` starts the ranks on this machine and prints the results. Tests use
``UntrainedRun`` to assert the counts.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.launcher import LaunchConfig, elastic_launch

from megatron_mesh.checkpoint.content import TrainState
from megatron_mesh.checkpoint.load import Search, load_checkpoint
from megatron_mesh.checkpoint.save import Saved, Saver
from megatron_mesh.checkpoint.shares import MOMENTS, allocate, only_member
from megatron_mesh.checkpoint.writer import file_of
from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import with_values
from megatron_mesh.metrics.console import show_messages
from megatron_mesh.parallel import Stage, build_stage
from megatron_mesh.planner.text import size
from megatron_mesh.runtime import device
from megatron_mesh.runtime.distributed import is_rank_zero, model_parallel_groups
from megatron_mesh.runtime.run_files import CHECKPOINTS
from megatron_mesh.train.optimizer import build_optimizer, build_schedule
from tools.bench.counting import Counts, counted

T = TypeVar("T")

SAVE, BACKGROUND, COPY = "save", "save in the background", "copy of its file"
LOAD, LOAD_OTHER = "load, same layout", "load, another layout"
KINDS = (SAVE, BACKGROUND, COPY, LOAD, LOAD_OTHER)


@dataclass(frozen=True)
class Operation:
    """What one rank did in one operation. Sizes are in bytes."""

    kind: str
    seconds: float
    stall_seconds: float
    """How long training would have waited."""
    written: int = 0
    read: int = 0
    memory: int = 0
    """This field and the following ones are as in ``Counts``."""
    sent: int = 0
    received: int = 0
    opened: int = 0


@dataclass
class UntrainedRun:
    """A run's complete state, including the optimizer's, before any step."""

    config: Config
    stage: Stage
    optimizer: Any
    state: TrainState

    def save(self, directory: Path, *, background: bool = False) -> tuple[Counts, Saved]:
        """Save to ``directory``; a collective. A background save runs alone, without training next to it."""
        saved: list[Saved] = []
        self.state.advance(1)  # each step can be saved only once
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
        """Load ``checkpoint``; a collective."""
        settings = replace(self.config.checkpoint, load=str(checkpoint), save=None)
        dist.barrier()
        with counted(checkpoint) as counts:
            found = Search(settings).next()
            assert found is not None
            damage = load_checkpoint(found, self.config, self.stage, self.optimizer, self.state)
        assert not damage, damage
        return counts


def build_untrained(config: Config) -> UntrainedRun:
    """Build this rank's state. Megatron's groups must exist."""
    stage = build_stage(config)
    optimizer = build_optimizer(config, stage)
    allocate(optimizer)
    for state in only_member(optimizer).optimizer.state.values():
        for name in MOMENTS:  # memory is resident only once something is written to it
            state[name].uniform_()
    return UntrainedRun(config, stage, optimizer, TrainState(build_schedule(config.optimizer, optimizer)))


def measure_rank(config: Config, directory: Path, rounds: int) -> list[Operation]:
    """Save in both ways, copy and load in turn, then load on another rank layout. Runs on every rank."""
    with model_parallel_groups(config):
        found = _save_and_load(config, directory, rounds)
    other = other_layout(config, dist.get_world_size())
    if other is not None:
        with model_parallel_groups(other):
            found += _load(other, directory, rounds)
    return found


def _save_and_load(config: Config, directory: Path, rounds: int) -> list[Operation]:
    """Measure on the rank layout of ``config``. One checkpoint is left, for the other layout."""
    run, found, copies = build_untrained(config), [], directory / "copy"
    checkpoint = run.save(directory)[1].path

    def save(kind: str) -> Path:
        counts, saved = run.save(directory, background=kind == BACKGROUND)
        found.append(_figures(kind, counts, saved.path, saved.stall_seconds))
        return saved.path

    def copy() -> Path:
        found.append(_copy(checkpoint, copies))
        return copies

    writes: list[Callable[[], Path]] = [partial(save, SAVE), partial(save, BACKGROUND), copy]
    for number in range(rounds):
        print_progress(f"round {number + 1} of {rounds}: saving and copying")
        for write in rotated(writes, number):
            _remove(write())
        print_progress(f"round {number + 1} of {rounds}: loading")
        found.append(_figures(LOAD, run.load(checkpoint), checkpoint))
    return found


def _remove(path: Path) -> None:
    """Remove a directory once all ranks have finished with it."""
    dist.barrier()
    if is_rank_zero():
        shutil.rmtree(path)
    dist.barrier()


def _load(config: Config, directory: Path, rounds: int) -> list[Operation]:
    """Load the one checkpoint in ``directory``."""
    run, (checkpoint,) = build_untrained(config), list(directory.glob(CHECKPOINTS))
    found = []
    for number in range(1, rounds + 1):
        print_progress(f"another rank layout, round {number} of {rounds}: loading")
        found.append(_figures(LOAD_OTHER, run.load(checkpoint), checkpoint))
    return found


def _figures(kind: str, counts: Counts, checkpoint: Path, stall: float | None = None) -> Operation:
    return Operation(
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


def _copy(checkpoint: Path, copies: Path) -> Operation:
    """Copy this rank's file, with fsync, while the other ranks copy theirs."""
    copies.mkdir(exist_ok=True)
    source = checkpoint / file_of(dist.get_rank())
    dist.barrier()
    start = time.perf_counter()
    copy = shutil.copyfile(source, copies / source.name)
    with open(copy, "rb") as file:
        os.fsync(file.fileno())
    seconds, size = time.perf_counter() - start, copy.stat().st_size
    return Operation(COPY, seconds, seconds, written=size, read=size)


def other_layout(config: Config, ranks: int) -> Config | None:
    """Toggle tensor parallelism on the same ranks. Returns None for an odd number of ranks."""
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
        "global_batch_size": training.micro_batch_size * ranks,  # must be valid, but no step uses it
    }
    return resolve(with_values(config, values), world_size=ranks)


def summary_rows(by_rank: list[list[Operation]]) -> list[list[str]]:
    """Tabulate each operation on each rank: median seconds, and maximum bytes over the rounds."""
    head = ["", "rank", "seconds", "waiting", "written", "read", "memory", "sent", "received", "files opened"]
    rows = [head]
    for kind in KINDS:
        for rank, every in enumerate(by_rank):
            chosen = [operation for operation in every if operation.kind == kind]
            if not chosen:
                continue
            seconds = [median(getattr(f, name) for f in chosen) for name in ("seconds", "stall_seconds")]
            names = ("written", "read", "memory", "sent", "received")
            sizes = [size(max(getattr(f, name) for f in chosen)) for name in names]
            opened = str(max(f.opened for f in chosen))
            rows.append([kind, str(rank), *(f"{each:.2f}" for each in seconds), *sizes, opened])
    return rows


def rotated(items: Sequence[T], number: int) -> list[T]:
    """Rotate ``items`` so that each round begins with a different one.

    A disk may accept the first gigabytes faster than those that follow.
    """
    first = number % len(items)
    return [*items[first:], *items[:first]]


def on_ranks(ranks: int, work: Callable[..., T], *args: object) -> list[T]:
    """Call ``work(*args)`` in new processes with torch.distributed initialized, as torchrun would.

    Args:
        work: a module-level function; the processes import it.

    Returns:
        Its results, by rank.

    Raises:
        torch.distributed.elastic.multiprocessing.errors.ChildFailedError: a process failed. Its traceback is
        on
            stderr.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="bench",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    results = elastic_launch(settings, _work)(work, *args)
    return [results[rank] for rank in range(ranks)]


def _work(work: Callable[..., T], *args: object) -> T:
    show_messages(False)
    device.prepare()
    dist.init_process_group(device.backend())
    try:
        return work(*args)
    finally:
        dist.destroy_process_group()


def print_progress(text: str) -> None:
    """Print what comes next to stderr, from rank 0 only."""
    if is_rank_zero():
        print(text, file=sys.stderr, flush=True)
