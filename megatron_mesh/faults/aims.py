"""The targets of the fault test: phases of a run x victims, and how kills are spread over them."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

from megatron_mesh.errors import UserError

ONE, ALL, RANK_ZERO, WRITER = "one rank", "all", "rank 0", "the writer"
"""Victims: one rank other than 0, all ranks, rank 0, or a rank in the middle of writing its file."""


@dataclass(frozen=True)
class Phase:
    """A phase of a run.

    Args:
        name: shown to the user.
        event: the name under which the trainer enters the phase (``runtime/phases.py``).
        on_all: whether all ranks enter it; otherwise only rank 0 does.
        with_writer: whether a rank's writer thread may be writing at the same time.
        saving: whether the phase belongs to a periodic save.
        at_end: whether it comes once, after the last step.
    """

    name: str
    event: str
    on_all: bool = True
    with_writer: bool = False
    saving: bool = False
    at_end: bool = False

    @property
    def victims(self) -> list[str]:
        """The victims that can be hit in this phase."""
        return [ONE, ALL, RANK_ZERO, *([WRITER] if self.with_writer else [])]


START, LOADING = Phase("start", "groups"), Phase("loading", "loading a checkpoint")
STEP, EVALUATION = (
    Phase("a step", "step", with_writer=True),
    Phase("evaluation", "evaluation", with_writer=True),
)
WRITING = Phase("writing in the background", "writing in the background", with_writer=True, saving=True)
CHECKS = Phase("checks", "checks", on_all=False, saving=True)
PHASES = (
    START,
    LOADING,
    STEP,
    EVALUATION,
    Phase("planning a save", "planning a save", saving=True),
    WRITING,
    Phase("between data and .metadata", "between data and .metadata", saving=True),
    CHECKS,
    Phase("rename", "rename", on_all=False, saving=True),
    Phase("latest", "latest", on_all=False, saving=True),
    Phase("pruning", "pruning", on_all=False, saving=True),
    Phase("deleting", "deleting", on_all=False, saving=True),
    Phase("the last save", "the last save", with_writer=True, at_end=True),
    Phase("the end", "the end", at_end=True),
)


@dataclass(frozen=True)
class FaultTarget:
    """What to hit: a victim in a phase."""

    phase: Phase
    victim: str

    def __str__(self) -> str:
        return f"{self.phase.name} x {self.victim}"

    def victim_ranks(self, ranks: int, rng: random.Random) -> list[int]:
        """The ranks that receive the signal."""
        if self.victim == ALL:
            return list(range(ranks))
        if self.victim == RANK_ZERO:
            return [0]
        return [rng.randrange(ranks) if self.victim == WRITER else rng.randrange(1, ranks)]

    def held_ranks(self, hit: Sequence[int]) -> list[int]:
        """The ranks that are held in the phase until the signal arrives."""
        return list(hit) if self.phase.on_all else [0]


def spread_kills(kills: int, rng: random.Random) -> list[FaultTarget]:
    """Spread kills evenly over the phases and over each phase's victims, in random order."""
    turns: dict[Phase, Iterator[str]] = {phase: cycle(phase.victims) for phase in PHASES}
    targets = [FaultTarget(phase, next(turns[phase])) for phase in islice(cycle(PHASES), kills)]
    rng.shuffle(targets)
    return targets


def parse_target(text: str) -> FaultTarget:
    """Parse a target such as ``"rename x rank 0"``.

    Raises:
        UserError: there is no such phase, or it has no such victim.
    """
    phase_name, _, victim = text.partition(" x ")
    by_name = {phase.name: phase for phase in PHASES}
    if phase_name not in by_name:
        raise UserError(
            f"--aim {text!r} names no known phase; write PHASE x VICTIM with one of: {', '.join(by_name)}"
        )
    phase = by_name[phase_name]
    if victim not in phase.victims:
        raise UserError(
            f"--aim {text!r} names no known victim; those of {phase_name!r} are: {', '.join(phase.victims)}"
        )
    return FaultTarget(phase, victim)


@dataclass
class Kill:
    """A kill that has been carried out."""

    target: FaultTarget
    step: int = 0
    """The last step that the run had logged."""
    notes: list[str] = field(default_factory=list)
    repeated: int = 0
    next_start: str = ""
    """What the next start printed about where it resumes."""
