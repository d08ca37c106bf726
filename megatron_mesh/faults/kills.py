"""Kill a run in chosen phases and restart it until it reaches its end, then begin with another run."""

import math
import random
import sys
from collections.abc import Iterator
from signal import SIGKILL

from megatron_mesh.checkpoint.directory import saved_steps
from megatron_mesh.faults.aims import LOADING, PHASES, START, STEP, WRITER, WRITING, FaultTarget, Kill
from megatron_mesh.faults.job import RankGroup
from megatron_mesh.faults.rank import Aim
from megatron_mesh.faults.runs import (
    Setup,
    compare_losses,
    logged_steps,
    newest_step,
    resume_error,
    resume_message,
    unfinished_checkpoints,
)

_PATIENCE = 10.0
"""How many seconds after a kill the other ranks are killed too, as by a launcher."""
_END_ZONE = 3
"""With fewer saves than this left, aim only at the phases at the end of the run."""


class KillInjector:
    """Carries out the kills in ``targets`` on one run after another.

    Args:
        imports_seconds: how long a new interpreter imports the program; needed if a target is a start.
    """

    def __init__(
        self, setup: Setup, targets: list[FaultTarget], rng: random.Random, imports_seconds: float = 0.0
    ):
        self.setup, self.rng, self.imports_seconds = setup, rng, imports_seconds
        self.done: list[Kill] = []
        self._targets, self._planned = list(targets), len(targets)
        at_end = sum(target.phase.at_end for target in targets)
        saves = setup.saves_after(0)
        # A kill uses up a save or two. That gives the number of runs, over which kills at the end are spread.
        self._at_end_per_run = (
            math.ceil(at_end / math.ceil((len(targets) - at_end + 1) / saves)) if at_end else 0
        )

    def run(self) -> list[Kill]:
        """Carry out all kills.

        Raises:
            AssertionError: something was lost, skipped, repeated too often, or left over.
        """
        number = 0
        while self._targets:
            number += 1
            run = KilledRun(self.setup, f"run-{number}", self.rng, self.imports_seconds)
            for target in self._chosen(run):
                kill = run.kill(target)
                self.done.append(kill)
                self._show(run.take_reported())
            run.finish()
            self._show(run.take_reported())
        return self.done

    def _chosen(self, run: "KilledRun") -> Iterator[FaultTarget]:
        """Pop and yield the targets that the run can still reach."""
        at_end = 0
        while self._targets:
            middle = [target for target in self._targets if not target.phase.at_end]
            # A kill at the very end leaves nothing to save, so those in the last save come first.
            ends = sorted((t for t in self._targets if t.phase.at_end), key=lambda t: PHASES.index(t.phase))
            near = self.setup.saves_after(newest_step(run.save)) < _END_ZONE
            if middle and not near:
                target = middle[0]
            elif ends and (at_end < self._at_end_per_run or not middle):
                target = ends[0]
                at_end += 1
            else:
                return
            self._targets.remove(target)
            yield target

    def _show(self, reported: list[Kill]) -> None:
        for kill in reported:
            number = 1 + next(i for i, each in enumerate(self.done) if each is kill)
            notes = "".join(f"; {note}" for note in kill.notes)
            print(
                f"kill {number} of {self._planned}: {kill.target}, at step {kill.step}; "
                f"the next start: {kill.next_start}; steps repeated: {kill.repeated}{notes}",
                file=sys.stderr,
                flush=True,
            )


class KilledRun:
    """A run that is killed and restarted between its first step and its last."""

    def __init__(self, setup: Setup, name: str, rng: random.Random, imports_seconds: float = 0.0):
        self.setup, self._rng, self._imports_seconds = setup, rng, imports_seconds
        self.save, self.log = setup.directory / name, setup.directory / f"{name}.log"
        self._waiting: list[Kill] = []
        """Kills since which no start has taken a step."""
        self._reported: list[Kill] = []
        self._started_at = 0
        self._complete: list[int] = []
        """Steps of the checkpoints that were complete before the last start."""
        self._loads = 1
        """How often a resuming start enters the loading phase."""

    def kill(self, target: FaultTarget) -> Kill:
        """Start the run and kill it in the target's phase."""
        if target.phase is LOADING and not newest_step(self.save):
            self._train_a_little()
        hit = target.victim_ranks(self.setup.ranks, self._rng)
        held = target.held_ranks(hit)
        aim = self._aim(target)
        # Of the kills at the start, half hit the imports of new interpreters and half the rendezvous.
        while_importing = target.phase is START and self._rng.random() < 0.5
        with self._start(
            {} if while_importing else dict.fromkeys(held, aim), fresh=target.phase is START
        ) as job:
            if while_importing:
                job.wait_until(lambda: job.imported, self._rng.uniform(0.05, 0.9) * self._imports_seconds)
            elif not job.wait_until_held(held):
                raise AssertionError(
                    f"{target}: the run did not reach it (exit codes {job.exit_codes}); see {self.log}"
                )
            self._record_start(job)
            kill = Kill(target)
            job.signal(hit, SIGKILL)
            job.release(range(self.setup.ranks))
            # At the rendezvous the other ranks wait for the missing one, so don't wait for them to end.
            if (
                not job.wait_until_ended(1.0 if target.phase is START else _PATIENCE)
                and target.phase is not START
            ):
                kill.notes.append(f"the other ranks had to be killed after {_PATIENCE:.0f} s")
        kill.step = (logged_steps(self.save) or [0])[-1]
        self._waiting.append(kill)
        return kill

    def finish(self) -> None:
        """Start the run once more, let it finish, and compare its losses with the undisturbed run's."""
        with self._start({}) as job:
            assert job.wait_until_ended(), f"the last start did not end in time; see {self.log}"
            assert job.exit_codes == [0] * self.setup.ranks, (
                f"the last start ended with {job.exit_codes}; see {self.log}"
            )
            self._record_start(job, ended=True)
        assert not unfinished_checkpoints(self.save), (
            f"left over in {self.save}: {unfinished_checkpoints(self.save)}"
        )
        compare_losses(self.setup.directory / "calm", self.save)

    def take_reported(self) -> list[Kill]:
        """Kills whose outcome has become known since the last call."""
        reported, self._reported = self._reported, []
        return reported

    def _aim(self, target: FaultTarget) -> Aim:
        phase, rng = target.phase, self._rng
        left = self.setup.saves_after(newest_step(self.save))
        save = rng.randint(1, min(2, left)) if left else 1
        if phase is WRITING and target.victim == WRITER:
            return Aim("", writing=save)
        if target.victim == WRITER and phase.at_end:
            # With no step left, nothing is written, and only the end itself can be aimed at.
            return Aim(phase.event, writing=left)
        if target.victim == WRITER:
            return Aim(phase.event, writing=min(save, max(1, left - 1)))
        several = {STEP: 2 * self.setup.save_interval, LOADING: self._loads}
        occurrences = several.get(phase, 2 if phase.saving else 1)
        most = min(occurrences, left) if phase.saving else occurrences
        return Aim(phase.event, occurrence=rng.randint(1, max(1, most)))

    def _start(self, aims: dict[int, Aim], *, fresh: bool = False, more: tuple[str, ...] = ()) -> RankGroup:
        self._started_at, self._complete = len(logged_steps(self.save)), list(saved_steps(self.save))
        flags = [*self.setup.flags(self.save), *more]
        return RankGroup(self.setup.ranks, flags, self.save, self.log, aims, fresh=fresh)

    def _train_a_little(self) -> None:
        """Train to the first checkpoint, so that there is one to load."""
        with self._start({}, more=("--exit-interval", str(self.setup.save_interval))) as job:
            job.wait_until_ended()
            assert newest_step(self.save), f"no checkpoint was written: {job.exit_codes}; see {self.log}"
            self._record_start(job, ended=True)

    def _record_start(self, job: RankGroup, *, ended: bool = False) -> None:
        """Check where this start resumed, and record that and the repeated steps for the kills before it."""
        assert not job.unfinished, f"left over after a start: {job.unfinished}; see {self.log}"
        said = resume_message(job.output, bool(job.phase_counts[STEP.event]) or ended)
        wrong = resume_error(said, self._complete)
        assert not wrong, f"a start {wrong}; see {self.log}"
        for kill in self._waiting:
            kill.next_start = kill.next_start or said
        done = logged_steps(self.save)[self._started_at :]
        if done and said.startswith("resumes"):
            self._loads = job.phase_counts[LOADING.event]
        if not self._waiting or not (done or ended):
            return
        if done:  # no start between the first of these kills and this one took a step
            first = self._waiting[0]
            first.repeated = max(0, first.step - done[0] + 1)
            limit = 2 * self.setup.save_interval
            assert first.repeated <= limit, f"{first.repeated} steps were repeated; see {self.log}"
        self._reported += self._waiting
        self._waiting = []
