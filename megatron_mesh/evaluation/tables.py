"""A table, for the console and for Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table
from rich.text import Text


@dataclass
class Sheet:
    """Cells of text with a title; the first ``names`` columns hold names, the others numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1
    notes: list[str] = field(default_factory=list)

    def rich(self) -> Table:
        """For the console."""
        table = Table(
            title=Text(self.title), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD
        )
        if self.notes:
            table.caption = Text("\n".join(self.notes))
        for index, name in enumerate(self.header):
            table.add_column(Text(name), justify="left" if index < self.names else "right")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """With the notes below it."""
        rule = ["---" if index < self.names else "---:" for index in range(len(self.header))]
        lines = [f"| {' | '.join(_escaped(cells))} |" for cells in (self.header, rule, *self.rows)]
        notes = [f"{note}  " for note in _escaped(self.notes)]
        return "\n".join([f"## {self.title}", "", *lines, *([""] if notes else []), *notes, ""])


def _escaped(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]
