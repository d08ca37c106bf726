"""Faults other than kills: ranks that stop for a while or hang, and a full disk.

The summary table of the fault test.
"""

import random
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby, islice
from pathlib import Path
from signal import SIGCONT, SIGSTOP

from megatron_mesh.checkpoint.directory import saved_steps
from megatron_mesh.faults.aims import (
    ALL,
    CHECKS,
    EVALUATION,
    ONE,
    PHASES,
    RANK_ZERO,
    STEP,
    WRITER,
    WRITING,
    FaultTarget,
    Kill,
)
from megatron_mesh.faults.job import RankGroup
from megatron_mesh.faults.kills import KilledRun
from megatron_mesh.faults.rank import Aim, DiskUnavailable, SmallDisk
from megatron_mesh.faults.runs import Setup, compare_losses, read_records, resume_error, resume_message
from megatron_mesh.runtime import exits

STOP_SECONDS = 3.0
WATCHDOG_SECONDS = 6.0
_DISK_MEGABYTES = 16
_STOPS = (
    FaultTarget(STEP, ONE),
    FaultTarget(WRITING, WRITER),
    FaultTarget(EVALUATION, ALL),
    FaultTarget(WRITING, RANK_ZERO),
    FaultTarget(STEP, WRITER),
)
_FULL = (FaultTarget(WRITING, ALL), FaultTarget(CHECKS, RANK_ZERO))


@dataclass(frozen=True)
class Fault:
    """A fault that was injected, and how the run reacted."""

    kind: str
    target: FaultTarget
    outcome: str


class FaultInjector:
    """Injects faults into runs of ``setup``; raises AssertionError if a run doesn't react as it should."""

    def __init__(self, setup: Setup, rng: random.Random, show: Callable[[Fault], None]):
        self.setup, self._rng, self._show = setup, rng, show
        self.done: list[Fault] = []

    def stop(self, times: int) -> None:
        """Stop ranks with SIGSTOP for a while, several times in one run, which must continue unharmed."""
        if not times:
            return
        save, log = self._paths("stopped")
        with RankGroup(self.setup.ranks, self.setup.flags(save), save, log) as job:
            for target in islice(cycle(_STOPS), times):
                hit = self._hold_ranks(job, target, log)
                job.signal(hit, SIGSTOP)
                time.sleep(STOP_SECONDS)
                job.signal(hit, SIGCONT)
                job.release(range(self.setup.ranks))
                self._record(f"SIGSTOP for {STOP_SECONDS:.0f} s", target, "the run continues")
            self._check_end(job, save, log)

    def hang(self, times: int) -> None:
        """Stop a rank for longer than the watchdog waits: the others must report it, later starts resume."""
        run = KilledRun(self.setup, "hung", self._rng)
        for victim in islice(cycle((ONE, RANK_ZERO)), times):
            minutes = ("--watchdog-timeout-minutes", str(WATCHDOG_SECONDS / 60))
            target = FaultTarget(STEP, victim)  # rank 0 also hosts the store of torch.distributed
            hit = target.victim_ranks(self.setup.ranks, self._rng)
            aim = Aim(STEP.event, occurrence=self.setup.save_interval + 2)
            complete = list(saved_steps(run.save))
            with RankGroup(
                self.setup.ranks, [*self.setup.flags(run.save), *minutes], run.save, run.log, {hit[0]: aim}
            ) as job:
                assert job.wait_until_held(hit), (
                    f"{target}: the run did not reach it (exit codes {job.exit_codes}); see {run.log}"
                )
                wrong = resume_error(resume_message(job.output, stepped=True), complete)
                assert not wrong, f"a start {wrong}; see {run.log}"
                job.signal(hit, SIGSTOP)
                job.release(hit)
                others = [rank for rank in range(self.setup.ranks) if rank not in hit]
                ended = job.wait_until(lambda: all(job.exit_codes[rank] is not None for rank in others), 60)  # noqa: B023
                assert ended, f"the watchdog did not end ranks {others}; see {run.log}"
                said = re.search(
                    r"error: (rank .* has made no progress for .*\(--watchdog-timeout-minutes\))", job.output
                )
                assert said and exits.HUNG in job.exit_codes, (
                    f"the watchdog printed no message (exit codes {job.exit_codes}); see {run.log}"
                )
                job.signal(hit, SIGCONT)
                assert job.wait_until_ended(60), f"the stopped rank did not end after SIGCONT; see {run.log}"
            self._record("SIGSTOP for longer than the watchdog", target, said[1])
        if times:
            run.finish()

    def fill_disk(self, times: int) -> str:
        """Fill the disk in the middle of a save, several times in one run: only that checkpoint may be lost.

        Returns:
            Why this could not be done, or "".
        """
        if not times:
            return ""
        save, log = self._paths("full")
        try:
            disk = SmallDisk(save, _DISK_MEGABYTES)
        except DiskUnavailable as error:
            return str(error)
        metrics = self.setup.directory / "full-metrics"
        flags = [*self.setup.flags(save), "--output-dir", str(metrics)]
        try:
            with RankGroup(self.setup.ranks, flags, save, log, namespace=disk.namespace) as job:
                for target in islice(cycle(_FULL), times):
                    self._hold_ranks(job, target, log)
                    failures = len(failed_saves(job.output))
                    disk.fill()
                    job.release(range(self.setup.ranks))
                    job.wait_until(lambda: len(failed_saves(job.output)) > failures, 60)  # noqa: B023
                    disk.empty()
                    reasons = failed_saves(job.output)
                    assert len(reasons) > failures, f"{target}: the full disk was not reported; see {log}"
                    named = rf"No space left on device \(rank \d+ on {re.escape(socket.gethostname())}"
                    assert re.match(named, reasons[-1]), f"the message names no rank and host: {reasons[-1]}"
                    self._record("the disk is full", target, reasons[-1])
                self._check_end(job, metrics, log)
            saved = [record["step"] for record in read_records(metrics) if record["kind"] == "save"]
            # On a busy machine the next save may also fail, if it begins before the disk is emptied.
            expected = self.setup.saves_after(0) - len(failed_saves(log.read_text(errors="replace")))
            assert len(saved) == expected, (
                f"{len(saved)} checkpoints were saved (steps {saved}) instead of {expected}; see {log}"
            )
        finally:
            disk.close()
        return ""

    def _hold_ranks(self, job: RankGroup, target: FaultTarget, log: Path) -> list[int]:
        """Hold ranks at the next occurrence of the target's phase, and return the ranks to hit."""
        hit = target.victim_ranks(self.setup.ranks, self._rng)
        held = target.held_ranks(hit)
        writing = int(target.victim == WRITER or target.phase is WRITING)
        phase = "" if target.phase is WRITING else target.phase.event
        for rank in held:
            job.aim(rank, Aim(phase, writing=writing))
        assert job.wait_until_held(held), (
            f"{target}: the run did not reach it (exit codes {job.exit_codes}); see {log}"
        )
        return hit

    def _paths(self, name: str) -> tuple[Path, Path]:
        return self.setup.directory / name, self.setup.directory / f"{name}.log"

    def _check_end(self, job: RankGroup, output: Path, log: Path) -> None:
        assert job.wait_until_ended(), f"the run did not end in time; see {log}"
        assert job.exit_codes == [0] * self.setup.ranks, f"exit codes {job.exit_codes}; see {log}"
        compare_losses(self.setup.directory / "calm", output)

    def _record(self, kind: str, target: FaultTarget, outcome: str) -> None:
        self.done.append(Fault(kind, target, outcome))
        self._show(self.done[-1])


def failed_saves(output: str) -> list[str]:
    """The reasons for failed saves in a run's output."""
    return re.findall(r"no checkpoint of step \d+ was written to \S+: (.*); earlier", output)


_HEAD = ("phase", "victim", "times", "steps repeated", "outcome")


def fault_table(kills: Sequence[Kill], faults: Sequence[Fault]) -> str:
    """A Markdown table with a row for each phase x victim that was hit, in the order of a run."""

    def place(kill: Kill) -> tuple[int, int]:
        phase = kill.target.phase
        return PHASES.index(phase), phase.victims.index(kill.target.victim)

    rows = [_HEAD]
    for _, group in groupby(sorted(kills, key=place), place):
        found = list(group)
        target, repeated = found[0].target, [kill.repeated for kill in found]
        span = f"{min(repeated)} to {max(repeated)}" if min(repeated) != max(repeated) else str(repeated[0])
        outcome = _counted([_outcome(kill) for kill in found])
        rows.append((target.phase.name, target.victim, str(len(found)), span, outcome))
    by_kind: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        by_kind.setdefault((f"{fault.kind}, {fault.target.phase.name}", fault.target.victim), []).append(
            fault
        )
    for (name, victim), same in by_kind.items():
        rows.append((name, victim, str(len(same)), "0", _counted([each.outcome for each in same])))
    return "\n".join(_markdown(rows))


def _outcome(kill: Kill) -> str:
    """What the next start did, without the step, which differs from kill to kill."""
    *complaints, begins = kill.next_start.split("; ")
    return "; ".join([*complaints, begins.rsplit(" at ", 1)[0], *kill.notes])


def _counted(texts: Sequence[str]) -> str:
    counts = Counter(texts)
    return ", ".join(text if len(counts) == 1 else f"{text} ({number})" for text, number in counts.items())


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)] + [0]
    lines = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"
        for row in rows
    ]
    rule = f"|{'|'.join('-' * max(3, width + 2) for width in widths)}|"
    return [lines[0], rule, *lines[1:]]
