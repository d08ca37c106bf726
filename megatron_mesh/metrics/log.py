"""Log a run's numbers to the console, metrics.jsonl, TensorBoard and Weights & Biases."""

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.console import Console

from megatron_mesh.config.schema import Config, LoggingConfig
from megatron_mesh.errors import UserError
from megatron_mesh.metrics.console import Bar, Kind, Lines, Record, Sink
from megatron_mesh.runtime import strict_json
from megatron_mesh.runtime.run_files import METRICS_FILE, WANDB_ID_FILE, replace_text

logger = logging.getLogger(__name__)


class Log:
    """Passes every record to every sink. On ranks other than 0 it has no sinks and does nothing.

    Args:
        directory: the directory of metrics.jsonl and config.yaml.
    """

    def __init__(self, sinks: Sequence[Sink] = (), directory: Path | None = None):
        self.sinks = [Guarded(sink) for sink in sinks]
        self.directory = directory
        self._opened = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time since the log was opened."""
        return time.monotonic() - self._opened

    def tick(self, step: int) -> None:
        """Note that optimizer step ``step`` is done."""
        for sink in self.sinks:
            sink.tick(step)

    def record(self, kind: Kind, step: int, **values: Any) -> None:
        """Log the numbers of step ``step``. If a sink fails, it loses them, but the run continues."""
        for sink in self.sinks:
            sink.write(Record(kind, step, values))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        for sink in self.sinks:
            sink.close()


class Guarded(Sink):
    """Wraps a sink so that no error of it ends the run, such as a full disk or a tracker without its server.

    The first error in a series is logged, and when the series ends, the number of records that were lost.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.name = type(sink).__name__
        self._lost = 0

    def tick(self, step: int) -> None:
        self._survive(lambda: self.sink.tick(step))

    def write(self, record: Record) -> None:
        lost_before = self._lost
        self._survive(lambda: self.sink.write(record))
        if lost_before and self._lost == lost_before:
            logger.warning("%s works again; records lost: %d", self.name, lost_before)
            self._lost = 0

    def close(self) -> None:
        if self._lost > 1:
            logger.error("%s is closed; records lost: %d", self.name, self._lost)
        self._lost = 0
        self._survive(self.sink.close)

    def _survive(self, work: Callable[[], None]) -> None:
        try:
            work()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # some trackers call sys.exit
            if not self._lost:
                logger.error(
                    "%s: numbers were not logged: %s; training continues",
                    self.name,
                    first_line(error),
                )
            self._lost += 1


def first_line(error: BaseException) -> str:
    """The type and first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def check_trackers(settings: LoggingConfig) -> None:
    """Raise UserError if the settings name a tracker whose package is not installed."""
    wanted = {
        "tensorboard": ("--tensorboard-dir", settings.tensorboard_dir),
        "wandb": ("--wandb-project", settings.wandb_project),
    }
    for package, (flag, value) in wanted.items():
        if value and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag} needs the package {package}; pip install {package}, or omit the flag")


def open_log(config: Config, directory: Path, step: int, last: int, *, same_run: bool = False) -> Log:
    """Open the sinks that the settings name.

    Args:
        step: the step at which the run starts; above 0 if it resumes.
        last: its last step.
        same_run: whether ``directory`` holds the output of an earlier start of this run.
    """
    settings = config.logging
    console = Console(soft_wrap=True)
    sinks: list[Sink] = [JsonLines(directory / METRICS_FILE)]
    trackers: dict[str, Callable[[], Sink]] = {}
    if tensorboard := settings.tensorboard_dir:
        trackers["TensorBoard"] = lambda: TensorBoard(tensorboard, step if same_run else None)
    if settings.wandb_project:
        trackers["Weights & Biases"] = lambda: WeightsAndBiases(
            config, wandb_run_id(directory, same_run), directory
        )
    for name, start in trackers.items():
        try:
            sinks.append(start())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # no server, no account, or a broken installation; some call sys.exit
            logger.error("cannot start %s: %s; training continues without it", name, first_line(error))
    sinks.append(Bar(console, step, last) if settings.progress and console.is_terminal else Lines(last))
    return Log(sinks, directory)


class JsonLines(Sink):
    """Appends one JSON object per line: ``kind``, ``step`` and the values."""

    def __init__(self, path: Path):
        cut_off = False  # whether an earlier start was killed while it wrote the last line
        if path.exists() and path.stat().st_size:
            with path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                cut_off = file.read() != b"\n"
        self.file = path.open("a", encoding="utf-8", buffering=1)
        if cut_off:
            self.file.write("\n")

    def write(self, record: Record) -> None:
        self.file.write(strict_json.dumps({"kind": record.kind, "step": record.step, **record.values}) + "\n")

    def close(self) -> None:
        self.file.close()


class TensorBoard(Sink):
    """TensorBoard events, named as in ``Record.flat``.

    Args:
        resumed_at: hide events that an earlier start wrote after this step.
    """

    def __init__(self, directory: str, resumed_at: int | None):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(directory, purge_step=None if resumed_at is None else resumed_at + 1)

    def write(self, record: Record) -> None:
        for name, value in record.flat():
            self.writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases(Sink):
    """The Weights & Biases run ``run_id``, new or resumed, with values named as in ``Record.flat``."""

    def __init__(self, config: Config, run_id: str, directory: Path):
        import wandb

        self.run = wandb.init(
            project=config.logging.wandb_project,
            name=config.logging.wandb_exp_name,
            config=asdict(config),
            dir=directory,
            id=run_id,
            resume="allow",
        )

    def write(self, record: Record) -> None:
        self.run.log(dict(record.flat()), step=record.step)

    def close(self) -> None:
        self.run.finish()


def wandb_run_id(directory: Path, same_run: bool) -> str:
    """The id of the Weights & Biases run. All starts of the run in ``directory`` share it.

    WANDB_RUN_ID in the environment takes precedence, as in wandb itself.
    """
    path, given = directory / WANDB_ID_FILE, os.environ.get("WANDB_RUN_ID")
    if given is None and same_run and path.exists() and (stored := path.read_text(encoding="utf-8").strip()):
        return stored
    number = given or uuid4().hex[:8]
    replace_text(path, f"{number}\n")
    return number
