"""Faults other than kills: stopped ranks, and a full disk."""

import random
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from signal import SIGCONT, SIGSTOP

from megatron_mesh.checkpoint.directory import saved_steps
from megatron_mesh.faults.aims import ALL, CHECKS, EVALUATION, ONE, RANK_ZERO, STEP, WRITER, WRITING, Target
from megatron_mesh.faults.disk import NoDisk, SmallDisk
from megatron_mesh.faults.job import Job
from megatron_mesh.faults.kills import HurtRun
from megatron_mesh.faults.rank import Aim
from megatron_mesh.faults.runs import Setup, compare, records, what_it_said, wrong_start
from megatron_mesh.runtime import exits

STOP_SECONDS = 3.0
WATCHDOG_SECONDS = 6.0
_DISK_MEGABYTES = 16
_STOPS = (
    Target(STEP, ONE),
    Target(WRITING, WRITER),
    Target(EVALUATION, ALL),
    Target(WRITING, RANK_ZERO),
    Target(STEP, WRITER),
)
_FULL = (Target(WRITING, ALL), Target(CHECKS, RANK_ZERO))


@dataclass(frozen=True)
class Mishap:
    """What happened to the run, and what it did."""

    kind: str
    target: Target
    outcome: str


class Mishaps:
    """Hurts runs of ``setup``; every method raises AssertionError if a run does not take it as it should."""

    def __init__(self, setup: Setup, rng: random.Random, show: Callable[[Mishap], None]):
        self.setup, self._rng, self._show = setup, rng, show
        self.done: list[Mishap] = []

    def stop(self, times: int) -> None:
        """SIGSTOP for a while, again and again in one run, which goes on unharmed."""
        if not times:
            return
        save, log = self._places("stopped")
        with Job(self.setup.ranks, self.setup.flags(save), save, log) as job:
            for target in islice(cycle(_STOPS), times):
                hit = self._hold(job, target, log)
                job.signal(hit, SIGSTOP)
                time.sleep(STOP_SECONDS)
                job.signal(hit, SIGCONT)
                job.go(range(self.setup.ranks))
                self._note(f"SIGSTOP for {STOP_SECONDS:.0f} s", target, "the run goes on")
            self._see_the_end(job, save, log)

    def hang(self, times: int) -> None:
        """SIGSTOP for longer than the watchdog waits: the others end, and say so; the next start goes on."""
        run = HurtRun(self.setup, "hung", self._rng)
        for victim in islice(cycle((ONE, RANK_ZERO)), times):
            minutes = ("--watchdog-timeout-minutes", str(WATCHDOG_SECONDS / 60))
            target = Target(STEP, victim)  # rank 0 holds the store, too
            hit = target.ranks_hit(self.setup.ranks, self._rng)
            aim = Aim(STEP.entered, occurrence=self.setup.save_interval + 2)
            complete = list(saved_steps(run.save))
            with Job(
                self.setup.ranks, [*self.setup.flags(run.save), *minutes], run.save, run.log, {hit[0]: aim}
            ) as job:
                assert job.until_held(hit), f"{target}: the run did not get there: {job.codes}; see {run.log}"
                wrong = wrong_start(what_it_said(job.text, stepped=True), complete)
                assert not wrong, f"a start {wrong}; see {run.log}"
                job.signal(hit, SIGSTOP)
                job.go(hit)
                others = [rank for rank in range(self.setup.ranks) if rank not in hit]
                ended = job.until(lambda: all(job.codes[rank] is not None for rank in others), 60)  # noqa: B023
                assert ended, f"the watchdog did not end ranks {others}; see {run.log}"
                said = re.search(
                    r"error: (rank .* has made no progress for .*\(--watchdog-timeout-minutes\))", job.text
                )
                assert said and exits.HUNG in job.codes, (
                    f"no message of the watchdog: {job.codes}; see {run.log}"
                )
                job.signal(hit, SIGCONT)
                assert job.until_ended(60), f"the rank that had been stopped does not end; see {run.log}"
            self._note("SIGSTOP for longer than the watchdog", target, said[1])
        if times:
            run.finish()

    def fill_disk(self, times: int) -> str:
        """Fill the disk in the middle of a save, again and again in one run: only that checkpoint is lost.

        Returns:
            Why this was not done, or "".
        """
        if not times:
            return ""
        save, log = self._places("full")
        try:
            disk = SmallDisk(save, _DISK_MEGABYTES)
        except NoDisk as error:
            return str(error)
        metrics = self.setup.directory / "full-metrics"
        flags = [*self.setup.flags(save), "--output-dir", str(metrics)]
        try:
            with Job(self.setup.ranks, flags, save, log, namespace=disk.namespace) as job:
                for target in islice(cycle(_FULL), times):
                    self._hold(job, target, log)
                    failures = len(failed_saves(job.text))
                    disk.fill()
                    job.go(range(self.setup.ranks))
                    job.until(lambda: len(failed_saves(job.text)) > failures, 60)  # noqa: B023
                    disk.empty()
                    reasons = failed_saves(job.text)
                    assert len(reasons) > failures, f"{target}: the full disk was not noticed; see {log}"
                    named = rf"No space left on device \(rank \d+ on {re.escape(socket.gethostname())}"
                    assert re.match(named, reasons[-1]), f"no rank and host are named: {reasons[-1]}"
                    self._note("the disk is full", target, reasons[-1])
                self._see_the_end(job, metrics, log)
            saved = [record["step"] for record in records(metrics) if record["kind"] == "save"]
            # On a busy machine the next save may begin before the disk is empty again.
            expected = self.setup.saves_after(0) - len(failed_saves(log.read_text(errors="replace")))
            assert len(saved) == expected, (
                f"{len(saved)} checkpoints were saved (steps {saved}), and {expected} did not fail; see {log}"
            )
        finally:
            disk.close()
        return ""

    def _hold(self, job: Job, target: Target, log: Path) -> list[int]:
        """Aim at the next time of a phase, wait until the ranks are there; returns the ranks to hit."""
        hit = target.ranks_hit(self.setup.ranks, self._rng)
        held = target.ranks_held(hit)
        writing = int(target.victim == WRITER or target.phase is WRITING)
        phase = "" if target.phase is WRITING else target.phase.entered
        for rank in held:
            job.aim(rank, Aim(phase, writing=writing))
        assert job.until_held(held), f"{target}: the run did not get there: {job.codes}; see {log}"
        return hit

    def _places(self, name: str) -> tuple[Path, Path]:
        return self.setup.directory / name, self.setup.directory / f"{name}.log"

    def _see_the_end(self, job: Job, output: Path, log: Path) -> None:
        assert job.until_ended(), f"the run does not end; see {log}"
        assert job.codes == [0] * self.setup.ranks, f"the run ended with {job.codes}; see {log}"
        compare(self.setup.directory / "calm", output)

    def _note(self, kind: str, target: Target, outcome: str) -> None:
        self.done.append(Mishap(kind, target, outcome))
        self._show(self.done[-1])


def failed_saves(said: str) -> list[str]:
    """Why saves have failed, of what a run said."""
    return re.findall(r"no checkpoint of step \d+ was written to \S+: (.*); earlier", said)
