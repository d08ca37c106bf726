#!/usr/bin/env python
"""Measure how checkpoints are saved and loaded, beside a copy of the same files.

In one process: how long training waits, and the speeds of saving and loading.

python tools/bench_checkpoint.py --config examples/configs/pythia-160m.yaml --seq-length 128 \\
    --global-batch-size 8 --micro-batch-size 1 --directory runs/bench

With --ranks N the tool starts N processes here. It prints seconds, bytes and memory of each rank: for saving,
saving in the background, loading on the same layout, and loading with tensor parallelism (or without, if the
settings have it).

python tools/bench_checkpoint.py --ranks 4 --config examples/configs/pythia-160m.yaml --seq-length 128 \\
    --global-batch-size 8 --micro-batch-size 1 --use-distributed-optimizer --directory runs/bench

The tool takes every setting of pretrain_mesh.py. It needs twice the size of the checkpoint on the disk.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mesh.arguments import parse_args
from megatron_mesh.config.checks import resolve
from megatron_mesh.config.schema import Config
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error

_NOTES = """\
Seconds and waiting are medians over the rounds; waiting is the part in which training stands still. The other
columns are the most of any round. Memory: peak of the resident memory (VmHWM) above what was resident before.
Sent and received: tensors given to, and filled by, collectives. After loading, ranks send each other weights.
Not a step is trained, and files are read from the page cache if they fit there."""


def main(argv: Sequence[str]) -> None:
    """Measure, and print a line for each figure or rank."""
    parser = argparse.ArgumentParser(
        prog="bench_checkpoint.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--directory", type=Path, required=True, help="where to save; must not exist")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (default: %(default)s)")
    parser.add_argument("--ranks", type=int, help="start this many processes, and count what each does")
    options, settings = parser.parse_known_args(argv)
    for name in ("rounds", "ranks"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    if options.directory.exists():
        raise UserError(f"--directory {options.directory} exists already; choose another")
    config = resolve(parse_args(settings, prog=parser.prog).config, world_size=options.ranks or 1)
    # Megatron-core takes seconds to import, and --help and mistakes do not need it.
    from megatron_mesh.planner.dry_run import with_vocabulary

    config = resolve(with_vocabulary(config), world_size=options.ranks or 1)
    options.directory.mkdir(parents=True)
    if options.ranks is None:
        _measure_one(config, options.directory, options.rounds)
    else:
        _measure_ranks(config, options.directory, options.rounds, options.ranks)


def _measure_one(config: Config, directory: Path, rounds: int) -> None:
    from megatron_mesh.bench.checkpoints import measure
    from megatron_mesh.runtime.distributed import process_groups

    with process_groups(config):
        found = measure(config, directory, rounds)
    speeds = {"save": found.sync_seconds, "load": found.load_seconds, "copy": found.copy_seconds}
    print(f"checkpoint {found.gigabytes:.2f} GB; a step takes {found.step_seconds:.2f} s")
    for name, seconds in speeds.items():
        speed, share = found.gigabytes * 1e3 / seconds, found.copy_seconds / seconds
        print(f"{name:<6} {seconds:6.2f} s  {speed:6.0f} MB/s  {share:4.0%} of copy")
    stall, whole = found.async_stall_seconds, found.async_seconds
    print(f"in the background {whole:.2f} s, of which training waits {stall:.2f} s: ", end="")
    print(f"{stall / found.sync_seconds:.1%} of a save in the foreground")


def _measure_ranks(config: Config, directory: Path, rounds: int, ranks: int) -> None:
    from megatron_mesh.bench.checkpoint_ranks import measure, summary
    from megatron_mesh.bench.counting import check_kernel
    from megatron_mesh.bench.launch import on_ranks
    from megatron_mesh.planner.text import table

    check_kernel()
    by_rank = on_ranks(ranks, measure, config, directory, rounds)
    print(table(summary(by_rank)))
    print(f"\n{_NOTES}")


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
