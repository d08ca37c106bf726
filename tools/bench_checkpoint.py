#!/usr/bin/env python
"""Stall, speed of saving and speed of loading of a model's checkpoints, beside a copy of the same files.

python tools/bench_checkpoint.py --config examples/configs/pythia-160m-mesh.yaml --seq-length 128 \\
    --global-batch-size 8 --micro-batch-size 1 --directory runs/bench

Takes every setting of pretrain_mesh.py; data are random; one process. Needs twice the checkpoint's size on
the disk.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mesh.arguments import parse_args
from megatron_mesh.config.checks import resolve
from megatron_mesh.errors import UserError


def main(argv: Sequence[str]) -> None:
    """Measure and print a line for each figure."""
    parser = argparse.ArgumentParser(
        prog="bench_checkpoint.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--directory", type=Path, required=True, help="where to save; must not exist")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    options, settings = parser.parse_known_args(argv)
    if options.directory.exists():
        raise UserError(f"--directory {options.directory} exists already; choose another")
    config = resolve(parse_args(settings, prog=parser.prog).config)
    # Megatron-core takes seconds to import, and --help and mistakes do not need it.
    from megatron_mesh.bench.checkpoints import measure
    from megatron_mesh.planner.dry_run import with_vocabulary
    from megatron_mesh.runtime.distributed import process_groups

    config = resolve(with_vocabulary(config))
    options.directory.mkdir(parents=True)
    with process_groups(config):
        found = measure(config, options.directory, options.rounds)
    speeds = {"save": found.sync_seconds, "load": found.load_seconds, "copy": found.copy_seconds}
    print(f"checkpoint {found.gigabytes:.2f} GB; a step takes {found.step_seconds:.2f} s")
    for name, seconds in speeds.items():
        speed, share = found.gigabytes * 1e3 / seconds, found.copy_seconds / seconds
        print(f"{name:<6} {seconds:6.2f} s  {speed:6.0f} MB/s  {share:4.0%} of copy")
    stall, whole = found.async_stall_seconds, found.async_seconds
    print(f"in the background {whole:.2f} s, of which training waits {stall:.2f} s: ", end="")
    print(f"{stall / found.sync_seconds:.1%} of a save in the foreground")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
