"""The numbers that a run reports, and the interface of the sinks that receive them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["train", "skipped", "valid", "test", "save", "save_failed", "summary"]


@dataclass(frozen=True)
class Record:
    """The numbers of one step. A value is a number, a string, or a list or dict of these."""

    kind: Kind
    step: int
    values: dict[str, Any]

    def flat(self) -> Iterator[tuple[str, float]]:
        """Every number with its own name, e.g. ``train/router/read/cycle1/slot2`` or ``valid/code``."""
        return _flatten(self.kind, self.values, ("cycle", "slot"))


def _flatten(name: str, value: Any, levels: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            # The losses of validation sets appear at the level of their mean.
            yield from _flatten(name if key == "sets" else f"{name}/{key}", inner, levels)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _flatten(f"{name}/{levels[0]}{index}", inner, levels[1:])
    elif isinstance(value, (int, float)):
        yield name, value


class Sink:
    """Receives records. This base class ignores them."""

    def tick(self, step: int) -> None:
        """Note that optimizer step ``step`` is done."""

    def write(self, record: Record) -> None:
        """Write a record."""

    def close(self) -> None:
        """Finish; no more records follow."""
