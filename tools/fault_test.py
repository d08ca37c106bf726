#!/usr/bin/env python
"""Hurt a small pretraining in every phase, again and again, and see that nothing is lost.

python tools/fault_test.py --output-dir runs/faults              # 100 kills, spread over phases and victims
python tools/fault_test.py --output-dir runs/faults --aim "rename x rank 0" --aim "latest x all"

The run is first trained undisturbed. Then it is killed (SIGKILL) in a phase that is aimed at, and started
again by the same command, until all kills are done and the run has ended. Every loss must be the
undisturbed run's, bit for bit. Every start must resume from the newest complete checkpoint, unless it says
that this one is damaged, and may leave no unfinished one. No more steps may be repeated than two save
intervals: one, and one while a write is under way. Further runs are stopped for a while (SIGSTOP), stopped
for longer than the watchdog waits, or have a disk that is full in the middle of a save.

Kills are aimed: each rank reports the phases that it enters, and holds in the one in which it is to be
killed. Victims: one rank (other than 0), all, rank 0, or the writer, which is a rank in the middle of
writing its file. A line for each kill goes to stderr, a table to stdout.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_mesh.errors import UserError
from megatron_mesh.faults.aims import START, parse_target, spread_kills
from megatron_mesh.faults.job import RankGroup
from megatron_mesh.faults.kills import KillInjector
from megatron_mesh.faults.mishaps import Fault, FaultInjector
from megatron_mesh.faults.report import fault_table
from megatron_mesh.faults.runs import Setup, write_inputs
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error

_D = "default: %(default)s"


def main(argv: Sequence[str]) -> int:
    """Train undisturbed and hurt, compare, and print what happened."""
    arguments = _parser().parse_args(argv)
    rng = random.Random(arguments.seed)
    targets = [parse_target(text) for text in arguments.aim] or spread_kills(arguments.kills, rng)
    setup = _setup(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the ranks' parent imports torch
    write_inputs(setup)
    calm, imports = train_calmly(setup, fresh=any(target.phase is START for target in targets))
    began = time.monotonic()
    kills = KillInjector(setup, targets, rng, imports).run()
    mishaps = FaultInjector(setup, rng, _show)
    mishaps.stop(arguments.stops)
    mishaps.hang(arguments.hangs)
    skipped = mishaps.fill_disk(arguments.full_disks)
    print(fault_table(kills, mishaps.done))
    if skipped:
        print(f"not done: filling the disk, because {skipped}")
    repeated = max((kill.repeated for kill in kills), default=0)
    seconds = time.monotonic() - began
    print(f"{len(kills)} kills and {len(mishaps.done)} mishaps in {seconds:.0f} s; undisturbed: {calm:.0f} s")
    print(f"every loss is the undisturbed run's, bit for bit; at most {repeated} steps were repeated")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fault_test.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output-dir", type=Path, required=True, help="an empty directory")
    add("--kills", type=int, default=100, help=f"how often to kill ({_D})")
    add(
        "--aim",
        action="append",
        default=[],
        metavar="'PHASE x VICTIM'",
        help="kill here instead; may be given several times, and a kill is done for each",
    )
    add("--stops", type=int, default=5, help=f"times to stop ranks for a while ({_D})")
    add(
        "--hangs", type=int, default=2, help=f"times to stop a rank for longer than the watchdog waits ({_D})"
    )
    add("--full-disks", type=int, default=4, help=f"times to fill the disk in the middle of a save ({_D})")
    add("--ranks", type=int, default=2, help=f"data-parallel ranks ({_D})")
    add("--steps", type=int, default=40, help=f"steps of the run ({_D})")
    add("--save-interval", type=int, default=4, help=f"in steps ({_D})")
    add("--seed", type=int, default=0, help=f"of the order, and of which rank and which save is hit ({_D})")
    return parser


def _setup(arguments: argparse.Namespace) -> Setup:
    directory: Path = arguments.output_dir
    setup = Setup(directory.resolve(), arguments.ranks, arguments.steps, arguments.save_interval)
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"--output-dir {directory} is not empty; choose another")
    if min(arguments.kills, arguments.stops, arguments.hangs, arguments.full_disks) < 0:
        raise UserError("--kills, --stops, --hangs and --full-disks must be at least 0")
    if arguments.ranks < 2:
        raise UserError(f"--ranks {arguments.ranks} leaves no other rank to kill; give at least 2")
    if arguments.save_interval < 2:
        raise UserError(f"--save-interval {arguments.save_interval} leaves no room; give at least 2")
    saves = setup.saves_after(0)
    if saves < max(5, 2 * arguments.full_disks, 2 * arguments.stops):
        raise UserError(
            f"--steps {setup.steps} with --save-interval {setup.save_interval} makes {saves} saves, too few; "
            "raise --steps to 5 intervals or more, and to 2 for each of --stops and --full-disks"
        )
    directory.mkdir(parents=True, exist_ok=True)
    return setup


def train_calmly(setup: Setup, *, fresh: bool) -> tuple[float, float]:
    """The undisturbed run.

    Returns:
        Its seconds, and, if ``fresh``, those in which its ranks imported the program.
    """
    save = setup.directory / "calm"
    log, began = save.with_suffix(".log"), time.monotonic()
    with RankGroup(setup.ranks, setup.flags(save), save, log, fresh=fresh) as job:
        job.wait_until(lambda: job.imported)
        imported = time.monotonic() - began
        job.wait_until_ended()
        assert job.exit_codes == [0] * setup.ranks, (
            f"the undisturbed run ended with {job.exit_codes}; see {log}"
        )
    return time.monotonic() - began, imported


def _show(mishap: Fault) -> None:
    print(f"{mishap.kind}: {mishap.target}; {mishap.outcome}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
