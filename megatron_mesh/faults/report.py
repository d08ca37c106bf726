"""The summary table of the fault test."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from megatron_mesh.faults.aims import PHASES, Kill
from megatron_mesh.faults.mishaps import Fault

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
