"""Tables of a report, for the console (with rich) and for Markdown files."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class TextTable:
    """A titled table whose cells are text.

    rich has a box style for Markdown, but it wraps rows at the console's width and doesn't escape "|".
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    """Number of leading columns that hold text. The others hold numbers and are aligned to the right."""
    notes: Sequence[str] = field(default_factory=list)
    """Paragraphs below the table."""

    def rich(self) -> Table:
        """Return the table for the console."""
        table = Table(
            title=Text(self.title), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD
        )
        if self.notes:
            table.caption = Text("\n".join(self.notes))
        for index, name in enumerate(self.header):
            table.add_column(Text(name), justify="left" if index < self.text_columns else "right")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """Return the table as Markdown, with its title as a heading."""
        rule = ["---" if index < self.text_columns else "---:" for index in range(len(self.header))]
        lines = [f"| {' | '.join(_escaped(cells))} |" for cells in (self.header, rule, *self.rows)]
        notes = [f"{note}  " for note in _escaped(self.notes)]
        return "\n".join([f"## {self.title}", "", *lines, *([""] if notes else []), *notes, ""])


def _escaped(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]
