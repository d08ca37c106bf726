"""The numbers that a run reports, and the interface of the sinks that receive them.

Show a run's progress: as a live bar on a terminal, as plain lines elsewhere.
"""

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

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


def show_messages(speaks: bool) -> None:
    """Send the package's log messages to stderr.

    Args:
        speaks: show all of them; otherwise only warnings and errors.
    """
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("megatron_mesh")
    package.handlers = [handler]
    package.setLevel(logging.INFO if speaks else logging.WARNING)
    package.propagate = False


class _CurrentStderr(logging.StreamHandler):
    """Writes to the current ``sys.stderr``, which rich replaces while a bar is live."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


class Lines(Sink):
    """Prints a line of text for each record."""

    def __init__(self, last: int, file: TextIO | None = None):
        self.last = last
        self.file = file

    def write(self, record: Record) -> None:
        if record.kind != "save_failed":  # the error was logged already
            print(self.text(record), file=self.file, flush=True)

    def text(self, record: Record) -> str:
        """The record as text."""
        if record.kind == "summary":
            return format_summary(record)
        text = f"step {record.step:>{len(str(self.last))}}/{self.last} | {numbers(record)}"
        if record.kind != "train":
            return text
        step_seconds = record.values["step_seconds"]
        memory = record.values["peak_memory_bytes"] / 2**30
        eta = timedelta(seconds=round(step_seconds * (self.last - record.step)))
        return f"{text} | {step_seconds:.3g} s/step | {memory:.1f} GiB | eta {eta}"


class Bar(Sink):
    """A live progress bar with the numbers of the last logged step. Other records are lines above it."""

    def __init__(self, console: Console, step: int, last: int):
        self.console = console
        self.lines = Lines(last)
        whole = Column(no_wrap=True)
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(table_column=whole),
            BarColumn(bar_width=20, table_column=whole),
            TextColumn("{task.description}", table_column=Column()),  # may wrap to a second line
            TextColumn("| eta"),
            TimeRemainingColumn(elapsed_when_finished=True, table_column=whole),
            console=console,
        )
        self.task = self.progress.add_task("", total=last, completed=step)
        self.progress.start()

    def tick(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def write(self, record: Record) -> None:
        if record.kind == "train":
            self.progress.update(self.task, completed=record.step, description=numbers(record))
            return
        if record.kind == "save_failed":
            return
        if record.kind == "summary":
            self.progress.stop()
        self.console.print(self.lines.text(record), markup=False, highlight=False)

    def close(self) -> None:
        self.progress.stop()


def numbers(record: Record) -> str:
    """The main numbers of a record on one line."""
    values = record.values
    if record.kind == "save":
        return f"saved {values['path']} in {values['seconds']:.1f} s"
    if record.kind == "skipped":
        loss, norm = values["loss"], values["grad_norm"]
        samples = f"{values['first_sample']} to {values['last_sample']}"
        if "sources" in values:
            samples += f": {values['sources']}"
        return f"not finite: loss {loss}, grad norm {norm}; step skipped (samples {samples})"
    if record.kind != "train":
        name = {"valid": "validation", "test": "test"}[record.kind]
        sets = "".join(f" | {name} {loss:.4f}" for name, loss in values.get("sets", {}).items())
        return f"{name} loss {values['loss']:.4f} | perplexity {values['perplexity']:.2f}{sets}"
    parts = [
        f"loss {values['loss']:.4f}",
        f"lr {values['lr']:.3e}",
        f"grad norm {values['grad_norm']:.3f}",
        f"{values['tokens_per_second']:,.0f} tokens/s",
        f"{values['tflops_per_device']:.3g} TFLOP/s",
    ]
    if "share_of_peak" in values:
        parts.append(f"{values['share_of_peak']:.1%} of peak")
    return " | ".join(parts)


def format_summary(record: Record) -> str:
    """A summary, one value per line."""
    lines = []
    for name, value in record.values.items():
        form = {float: ",.4f", int: ","}.get(type(value), "")
        text = format(value, form)
        lines.append(f"{name.replace('_', ' '):<18} {text}")
    return "\n".join(lines)
