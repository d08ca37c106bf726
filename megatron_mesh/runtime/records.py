"""The numbers that a run reports, and the interface of the sinks that take them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["train", "skipped", "valid", "test", "save", "save_failed", "summary"]


@dataclass(frozen=True)
class Record:
    """Numbers of one step; a value is a number, text, or lists and dicts of these."""

    kind: Kind
    step: int
    values: dict[str, Any]

    def flat(self) -> Iterator[tuple[str, float]]:
        """Every number by a name of its own, e.g. ``train/router/read/cycle1/slot2`` or ``valid/code``."""
        return _flatten(self.kind, self.values, ("cycle", "slot"))


def _flatten(name: str, value: Any, levels: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            # Validation sets stand beside the mean of their losses.
            yield from _flatten(name if key == "sets" else f"{name}/{key}", inner, levels)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _flatten(f"{name}/{levels[0]}{index}", inner, levels[1:])
    elif isinstance(value, (int, float)):
        yield name, value


class Sink:
    """A place for records. Does nothing by itself."""

    def tick(self, step: int) -> None:
        """Optimizer step ``step`` is done."""

    def write(self, record: Record) -> None:
        """Take a record."""

    def close(self) -> None:
        """No more records come."""
