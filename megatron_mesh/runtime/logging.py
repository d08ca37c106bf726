"""Log a run's numbers to the console, metrics.jsonl, TensorBoard and Weights & Biases."""

import importlib.util
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_mesh.config.schema import Config, LoggingConfig
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.console import Bar, Lines
from megatron_mesh.runtime.records import Kind, Record, Sink

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class Log:
    """Hands every record to every sink; without sinks, on ranks other than 0, it does nothing.

    Args:
        directory: where metrics.jsonl and the configuration are.
    """

    def __init__(self, sinks: Sequence[Sink] = (), directory: Path | None = None):
        self.sinks = sinks
        self.directory = directory
        self._opened = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time since the log was opened."""
        return time.monotonic() - self._opened

    def tick(self, step: int) -> None:
        """Optimizer step ``step`` is done."""
        for sink in self.sinks:
            sink.tick(step)

    def record(self, kind: Kind, step: int, **values: Any) -> None:
        """Log the numbers of step ``step``. A sink that fails loses them, and the run continues."""
        for sink in self.sinks:
            with _survived(sink):
                sink.write(Record(kind, step, values))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        with ExitStack() as stack:  # one sink's failure must not keep another from closing
            for sink in self.sinks:
                stack.enter_context(_survived(sink))
                stack.callback(sink.close)


@contextmanager
def _survived(sink: Sink) -> Iterator[None]:
    """A full disk must not end training."""
    try:
        yield
    except OSError as error:
        logger.error("%s: numbers were not logged: %s", type(sink).__name__, error)


def check_trackers(settings: LoggingConfig) -> None:
    """Raise UserError if a tracker is asked for whose package is not installed."""
    wanted = {
        "tensorboard": ("--tensorboard-dir", settings.tensorboard_dir),
        "wandb": ("--wandb-project", settings.wandb_project),
    }
    for package, (flag, value) in wanted.items():
        if value and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{flag} needs the package {package}; pip install {package}, or leave the flag out"
            )


def open_log(config: Config, directory: Path, step: int, last: int) -> Log:
    """Open the sinks that the settings name.

    Args:
        step: at which the run starts; above 0 if it resumes.
        last: at which it ends.
    """
    settings = config.logging
    console = Console(soft_wrap=True)
    sinks: list[Sink] = [JsonLines(directory / METRICS_FILE)]
    if settings.tensorboard_dir:
        sinks.append(TensorBoard(settings.tensorboard_dir, step))
    if settings.wandb_project:
        sinks.append(WeightsAndBiases(config, directory))
    sinks.append(Bar(console, step, last) if settings.progress and console.is_terminal else Lines(last))
    return Log(sinks, directory)


class JsonLines(Sink):
    """One JSON object a line: ``kind``, ``step`` and the values. Appends."""

    def __init__(self, path: Path):
        cut_off = False  # by a kill in the middle of a line
        if path.exists() and path.stat().st_size:
            with path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                cut_off = file.read() != b"\n"
        self.file = path.open("a", encoding="utf-8", buffering=1)
        if cut_off:
            self.file.write("\n")

    def write(self, record: Record) -> None:
        self.file.write(json.dumps({"kind": record.kind, "step": record.step, **record.values}) + "\n")

    def close(self) -> None:
        self.file.close()


class TensorBoard(Sink):
    """TensorBoard events, with the names of ``Record.flat``."""

    def __init__(self, directory: str, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(directory, purge_step=step + 1 if step else None)

    def write(self, record: Record) -> None:
        for name, value in record.flat():
            self.writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases(Sink):
    """A Weights & Biases run, with the names of ``Record.flat``."""

    def __init__(self, config: Config, directory: Path):
        import wandb

        self.run = wandb.init(
            project=config.logging.wandb_project,
            name=config.logging.wandb_exp_name,
            config=asdict(config),
            dir=directory,
        )

    def write(self, record: Record) -> None:
        self.run.log(dict(record.flat()), step=record.step)

    def close(self) -> None:
        self.run.finish()
