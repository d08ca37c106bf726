"""Measure how fast checkpoints are saved and loaded, next to a plain copy, and how long training waits.

In one process:

    python -m tools.bench.checkpoints --config examples/configs/pythia-160m.yaml --seq-length 128 \\
        --global-batch-size 8 --micro-batch-size 1 --directory runs/bench

With --ranks N the benchmark starts N processes on this machine. It prints seconds, bytes and memory of each
rank for saving, saving in the background, copying, loading on the same rank layout, and loading with tensor
parallelism (or without, if the settings have it).

    python -m tools.bench.checkpoints --ranks 4 --config examples/configs/pythia-160m.yaml \\
        --seq-length 128 --global-batch-size 8 --micro-batch-size 1 --use-distributed-optimizer \\
        --directory runs/bench

All settings of pretrain_mesh.py are accepted. The disk needs room for twice the size of the checkpoint.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from megatron_mesh import command
from megatron_mesh.arguments import parse_args
from megatron_mesh.checkpoint import integrity
from megatron_mesh.checkpoint.content import TrainState
from megatron_mesh.checkpoint.load import Search, load_checkpoint
from megatron_mesh.checkpoint.save import Saved, Saver
from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import at_least
from megatron_mesh.errors import UserError
from megatron_mesh.parallel import Stage, build_stage
from megatron_mesh.planner.text import format_table, with_vocabulary
from megatron_mesh.runtime.distributed import process_groups
from megatron_mesh.train.optimizer import build_optimizer, build_schedule
from megatron_mesh.train.step import train_step
from megatron_mesh.train.vote import Outcome, Vote
from tools.bench.checkpoint_ranks import measure_rank, on_ranks, rotated, summary_rows
from tools.bench.counting import check_kernel
from tools.bench.measure import now
from tools.bench.variants import random_batches

_NOTES = """\
Seconds and waiting are medians over the rounds; waiting is the time during which training stands still. The
other columns are maxima. Memory: peak resident memory (VmHWM) above what was resident before. Sent and
received: tensors passed to collectives and filled by them. After loading, ranks send each other weights. No
step is trained, and files are read from the page cache if they fit there."""


@dataclass(frozen=True)
class Options:
    """Options besides the settings of pretrain_mesh.py."""

    directory: Path
    """Where to save; must not exist."""
    rounds: int = 5
    """Repetitions."""
    ranks: int | None = None
    """Start this many processes and count what each one does."""


def main(options: Options, settings: list[str]) -> None:
    """Measure, and print one line per figure or rank."""
    at_least(1, options, "rounds", "ranks")
    if options.directory.exists():
        raise UserError(f"--directory {options.directory} exists already; choose another")
    config = resolve(parse_args(settings).config, world_size=options.ranks or 1)
    config = resolve(with_vocabulary(config), world_size=options.ranks or 1)
    options.directory.mkdir(parents=True)
    if options.ranks is None:
        with process_groups(config):
            found = measure_checkpoints(config, options.directory, options.rounds)
        _print_times(found)
    else:
        check_kernel()
        by_rank = on_ranks(options.ranks, measure_rank, config, options.directory, options.rounds)
        print(format_table(summary_rows(by_rank)))
        print(f"\n{_NOTES}")


@dataclass(frozen=True)
class CheckpointTimes:
    """Medians over the rounds, in one process."""

    gigabytes: float
    step_seconds: float
    sync_seconds: float
    async_seconds: float
    """From the start of a background save until the checkpoint is published."""
    async_stall_seconds: float
    """How long training waits during a background save."""
    load_seconds: float
    """Verifying all checksums and restoring the state."""
    copy_seconds: float
    """Copying the same files within the directory, with fsync. It follows a training step, as saves do."""


def measure_checkpoints(config: Config, directory: Path, rounds: int) -> CheckpointTimes:
    """Save in the foreground and in the background, copy and load, in turn. Megatron's groups must exist."""
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
        step()  # as before a save: after a step, the system may be slower to provide memory for files
        times["copy"].append(_seconds(lambda: _copy(checkpoint, directory / "copy")))
        shutil.rmtree(directory / "copy")

    def save_and_remove(background: bool) -> None:
        saved = save(background)
        times["async" if background else "sync"].append(saved.seconds)
        if background:
            times["stall"].append(saved.stall_seconds)
        shutil.rmtree(saved.path)

    step()
    checkpoint = save(background=False).path
    writes: list[Callable[[], None]] = [partial(save_and_remove, False), partial(save_and_remove, True), copy]
    for number in range(rounds):
        times["step"].append(_seconds(step))
        for write in rotated(writes, number):
            write()
        times["load"].append(_seconds(lambda: _load(config, checkpoint, stage, optimizer, state)))
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    shutil.rmtree(checkpoint)
    middle = {name: median(values) for name, values in times.items()}
    return CheckpointTimes(
        size / 1e9,
        middle["step"],
        middle["sync"],
        middle["async"],
        middle["stall"],
        middle["load"],
        middle["copy"],
    )


def _print_times(found: CheckpointTimes) -> None:
    speeds = {"save": found.sync_seconds, "load": found.load_seconds, "copy": found.copy_seconds}
    print(f"checkpoint {found.gigabytes:.2f} GB; a step takes {found.step_seconds:.2f} s")
    for name, seconds in speeds.items():
        speed, share = found.gigabytes * 1e3 / seconds, found.copy_seconds / seconds
        print(f"{name:<6} {seconds:6.2f} s  {speed:6.0f} MB/s  {share:4.0%} of copy")
    stall, whole = found.async_stall_seconds, found.async_seconds
    print(f"in the background {whole:.2f} s; training waits {stall:.2f} s of it, ", end="")
    print(f"{stall / found.sync_seconds:.1%} of a save in the foreground")


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


if __name__ == "__main__":
    command.run(main)
