"""Read the state of a run from its files, without asking SLURM."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_mesh.config.length import last_step
from megatron_mesh.config.schema import TrainingConfig
from megatron_mesh.config.sources import read_yaml
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import strict_json
from megatron_mesh.runtime.run_files import (
    BATCH_SCRIPT,
    CONFIG_FILE,
    JOBS_FILE,
    METRICS_FILE,
    STARTS_FILE,
    STATUS_FILE,
    checkpoint_step,
)
from megatron_mesh.slurm.script import sbatch_option, slurm_directory

_BLOCK = 1 << 20
_LONGEST_SEARCH = 64 * _BLOCK
"""Search at most this many bytes from the end of metrics.jsonl for the newest records."""


@dataclass(frozen=True)
class Event:
    """A line of ``starts.txt``: the start or the end of ``job.sh``."""

    token: str
    """Job number and restart number, separated by a dot."""
    step: int
    kind: str
    """start, or how it ended: done, stopped, failed, given-up, ended (by SLURM) or resumes."""
    time: str
    text: str

    @property
    def job(self) -> str:
        """The job number."""
        return self.token.rpartition(".")[0]


@dataclass(frozen=True)
class RunFiles:
    """The state of a run according to its files.

    Attributes:
        status: the first line of ``run_status.txt``, or "not started".
        causes: its other lines, which say why the run failed.
        jobs: numbers of the run's jobs, oldest first. A job submitted by hand appears with its first start.
        event: the last event of a job; None if the run was not started on SLURM.
        settings: the settings as in YAML; empty if no file of them can be read.
        train: the newest record of a training step in metrics.jsonl.
        save: the newest record of a checkpoint there.
        failed_saves: records of failed saves since then, oldest first.
        checkpoint: step of the newest complete checkpoint, or None.
        updated: when metrics.jsonl was last written, in the local time zone.
    """

    run: Path
    status: str
    causes: list[str]
    jobs: list[str]
    event: Event | None
    settings: dict[str, Any]
    train: dict[str, Any] | None
    save: dict[str, Any] | None
    failed_saves: list[dict[str, Any]]
    checkpoint: int | None
    updated: datetime | None

    @property
    def last_step(self) -> int | None:
        """The step at which the run will end, from its newest step; None if the settings are unknown."""
        training = TrainingConfig(
            train_iters=self.settings.get("train_iters"),
            train_samples=self.settings.get("train_samples"),
            global_batch_size=self.settings.get("global_batch_size"),
            rampup_batch_size=self.settings.get("rampup_batch_size"),
        )
        if training.train_iters is None and None in (training.train_samples, training.global_batch_size):
            return None
        step, samples = ((self.train or {}).get(name, 0) for name in ("step", "consumed_samples"))
        return last_step(training, step, samples)

    @property
    def steps_at_risk(self) -> int:
        """Steps that would be lost if the run ended now."""
        return max(0, (self.train or {}).get("step", 0) - (self.checkpoint or 0))


def read_files(run: Path) -> RunFiles:
    """Read the files of a run.

    Raises:
        UserError: ``run`` is not the directory of a run, or cannot be read.
    """
    try:
        return _read(run)
    except OSError as error:
        raise UserError(f"{error.filename or run} cannot be read ({error.strerror})") from None


def _read(run: Path) -> RunFiles:
    lines = _lines(run / STATUS_FILE)
    settings = _settings(run)
    metrics = _working_directory(run) / (settings.get("output_dir") or run) / METRICS_FILE
    events = [event for event in map(_event, _lines(slurm_directory(run) / STARTS_FILE)) if event]
    checkpoints = [step for path in run.iterdir() if (step := checkpoint_step(path.name)) is not None]
    if not (
        lines or events or checkpoints or metrics.exists() or (slurm_directory(run) / JOBS_FILE).exists()
    ):
        raise UserError(f"{run} is not a run: it has no jobs, no metrics.jsonl and no checkpoints")
    train, save, failed = _newest_records(metrics)
    jobs = dict.fromkeys([*_lines(slurm_directory(run) / JOBS_FILE), *(event.job for event in events)])
    return RunFiles(
        run=run,
        status=(lines or ["not started"])[0],
        causes=lines[1:],
        jobs=list(jobs),
        event=events[-1] if events else None,
        settings=settings,
        train=train,
        save=save,
        failed_saves=failed,
        checkpoint=max(checkpoints, default=None),
        updated=datetime.fromtimestamp(metrics.stat().st_mtime).astimezone() if metrics.exists() else None,
    )


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _settings(run: Path) -> dict[str, Any]:
    """The settings as submitted, or as the trainer wrote them; {} if an older version wrote them."""
    for path in (slurm_directory(run) / CONFIG_FILE, run / CONFIG_FILE):
        if path.is_file():
            try:
                return read_yaml(path)
            except UserError:
                continue
    return {}


def _working_directory(run: Path) -> Path:
    """The jobs' working directory, where relative paths in the settings start; this process's if unknown."""
    script = slurm_directory(run) / BATCH_SCRIPT
    text = script.read_text(encoding="utf-8") if script.is_file() else ""
    return Path(sbatch_option(text, "chdir") or "")


def _event(line: str) -> Event | None:
    words = line.split(maxsplit=4)
    if len(words) < 4 or not words[1].isdecimal():
        return None  # a "by-hand" line, a truncated one, or one that an older version wrote
    token, step, kind, time, *text = words
    return Event(token, int(step), kind, time, "".join(text))


def _newest_records(
    path: Path,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, list[dict[str, Any]]]:
    """The newest record of a step, the newest of a save, and the failed saves after it."""
    train: dict[str, Any] | None = None
    save: dict[str, Any] | None = None
    failed: list[dict[str, Any]] = []
    for line in _lines_backwards(path):
        try:
            record = strict_json.loads(line)
            kind = record["kind"]
        except (ValueError, TypeError, KeyError):
            continue  # truncated: the line is being written, or the run was killed while writing it
        if kind == "train":
            train = train or record
        elif kind == "save_failed" and save is None:
            failed.insert(0, record)
        elif kind == "save":
            save = save or record
        if train and save:
            break
    return train, save, failed


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """The lines of a file, last line first."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        stop, rest = max(0, end - _LONGEST_SEARCH), b""
        while end > stop:
            begin = max(0, end - _BLOCK)
            file.seek(begin)
            first, *lines = (file.read(end - begin) + rest).split(b"\n")
            yield from reversed(lines)
            rest, end = first, begin
        if end == 0:
            yield rest
