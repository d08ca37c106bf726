#!/usr/bin/env python
"""Kill and disturb a small run in every phase, again and again, and check that nothing is lost.

    python tools/fault_test.py --output-dir runs/faults            # 100 kills, spread over phases and victims
    python tools/fault_test.py --output-dir runs/faults --aim "rename x rank 0" --aim "latest x all"

First the run is trained undisturbed. Then it is killed (SIGKILL) in one phase after another, and the same
command starts it again each time, until all kills are done and the run has ended. The test checks that

- every loss equals that of the undisturbed run, bit for bit;
- every start resumes from the newest complete checkpoint, unless it reports this one as damaged;
- no start leaves an unfinished checkpoint behind;
- no start repeats more than one save interval, or two if a background save was killed.

Then ranks are paused for a while (SIGSTOP), a rank is paused for longer than the watchdog waits, and the disk
is full in the middle of a save.

Each rank reports the phases that it enters, and waits in the phase in which it is to be killed, so every kill
hits its target. The victim is "one rank" (other than 0), "all", "rank 0", or "the writer" (a rank in the
middle of writing its file). Each kill prints a line to stderr; a table of all kills goes to stdout.
"""

import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import UseAppendAction

from megatron_mesh import command
from megatron_mesh.errors import UserError

if TYPE_CHECKING:
    from megatron_mesh.faults.mishaps import Fault
    from megatron_mesh.faults.runs import Setup


@dataclass
class Options:
    """Options of the test."""

    output_dir: Path
    """An empty directory."""
    kills: int = 100
    """Number of kills, spread over all phases and victims."""
    aim: Annotated[tuple[str, ...], UseAppendAction] = ()
    """'PHASE x VICTIM': kill there, once for each --aim, instead of spreading --kills."""
    stops: int = 5
    """How often to pause ranks for a while."""
    hangs: int = 2
    """How often to pause a rank for longer than the watchdog waits."""
    full_disks: int = 4
    """How often to fill the disk in the middle of a save."""
    ranks: int = 2
    """Data-parallel ranks."""
    steps: int = 40
    """Steps of the run."""
    save_interval: int = 4
    """Steps between saves."""
    seed: int = 0
    """Random seed for the order of the kills and for the rank and save that each hits."""


def main(options: Options) -> None:
    """Train undisturbed and disturbed, compare, and print what happened."""
    try:
        _test(options)
    except AssertionError as error:
        if not str(error):  # a bug of this program
            raise
        sys.exit(f"error: {error}")


def _test(options: Options) -> None:
    from megatron_mesh.faults.aims import START, parse_target, spread_kills
    from megatron_mesh.faults.kills import KillInjector
    from megatron_mesh.faults.mishaps import FaultInjector, fault_table
    from megatron_mesh.faults.runs import write_inputs

    rng = random.Random(options.seed)
    targets = [parse_target(text) for text in options.aim] or spread_kills(options.kills, rng)
    setup = _setup(options)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the ranks' parent imports torch
    write_inputs(setup)
    undisturbed, imports = _train_undisturbed(setup, fresh=any(target.phase is START for target in targets))
    began = time.monotonic()
    kills = KillInjector(setup, targets, rng, imports).run()
    mishaps = FaultInjector(setup, rng, _show)
    mishaps.stop(options.stops)
    mishaps.hang(options.hangs)
    skipped = mishaps.fill_disk(options.full_disks)
    print(fault_table(kills, mishaps.done))
    if skipped:
        print(f"not done: filling the disk, because {skipped}")
    repeated = max((kill.repeated for kill in kills), default=0)
    seconds = time.monotonic() - began
    print(
        f"{len(kills)} kills and {len(mishaps.done)} mishaps in {seconds:.0f} s; "
        f"undisturbed: {undisturbed:.0f} s"
    )
    print(f"every loss is the undisturbed run's, bit for bit; at most {repeated} steps were repeated")


def _setup(options: Options) -> "Setup":
    from megatron_mesh.faults.runs import Setup

    directory = options.output_dir
    setup = Setup(directory.resolve(), options.ranks, options.steps, options.save_interval)
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"--output-dir {directory} is not empty; choose another")
    if min(options.kills, options.stops, options.hangs, options.full_disks) < 0:
        raise UserError("--kills, --stops, --hangs and --full-disks must be at least 0")
    if options.ranks < 2:
        raise UserError(f"--ranks {options.ranks} leaves no other rank to kill; give at least 2")
    if options.save_interval < 2:
        raise UserError(f"--save-interval {options.save_interval} leaves no room; give at least 2")
    saves = setup.saves_after(0)
    if saves < max(5, 2 * options.full_disks, 2 * options.stops):
        raise UserError(
            f"--steps {setup.steps} with --save-interval {setup.save_interval} makes {saves} saves, too few; "
            "raise --steps to 5 intervals or more, and to 2 for each of --stops and --full-disks"
        )
    directory.mkdir(parents=True, exist_ok=True)
    return setup


def _train_undisturbed(setup: "Setup", *, fresh: bool) -> tuple[float, float]:
    """Train without disturbance.

    Args:
        fresh: start new interpreters that import everything, instead of forks of a process that already has.

    Returns:
        The seconds that the run took, and the part of them before its ranks had imported the program.
    """
    from megatron_mesh.faults.job import RankGroup

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


def _show(mishap: "Fault") -> None:
    print(f"{mishap.kind}: {mishap.target}; {mishap.outcome}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    command.run(main)
