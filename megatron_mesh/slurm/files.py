"""What the files of a run say about it. Nothing here asks SLURM."""

import os
import re
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
from megatron_mesh.runtime.failures import STATUS_FILE
from megatron_mesh.slurm.script import SCRIPT, slurm_directory, sbatch_option
from megatron_mesh.slurm.submission import JOBS, SETTINGS_FILE, STARTS

_METRICS_FILE = "metrics.jsonl"
_BLOCK = 1 << 20
_LONGEST_SEARCH = 64 * _BLOCK
"""Bytes of metrics.jsonl, from its end, in which the newest records are looked for."""
_CHECKPOINT = re.compile(r"iter_(\d+)")


@dataclass(frozen=True)
class Event:
    """A line of ``starts.txt``: a start or an end of a job's script (``examples/slurm/job.sh``)."""

    token: str
    """SlurmJob and restart number."""
    step: int
    kind: str
    """start, or the end: done, stopped, failed, given-up, ended (by SLURM) or resumes."""
    time: str
    text: str

    @property
    def job(self) -> str:
        """The job's number."""
        return self.token.rpartition(".")[0]


@dataclass(frozen=True)
class RunFiles:
    """A run by its files.

    Attributes:
        status: the first line of ``run_status.txt``, or "not started".
        causes: the further lines: why the run failed.
        jobs: numbers of its jobs, the oldest first; those submitted by hand from their first start.
        event: the last one noted; None for a run outside of SLURM.
        settings: those that are known by their files, as in YAML.
        train: the newest record of a training step in metrics.jsonl; ``save`` of a checkpoint likewise.
        failed_saves: records of saves that have failed since, the oldest first.
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
        """The step at which the run ends, as seen from its newest step; None without settings."""
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
    """Read what is there.

    Raises:
        UserError: ``run`` is not a run's directory, or cannot be read.
    """
    try:
        return _read(run)
    except OSError as error:
        raise UserError(f"{error.filename or run} cannot be read ({error.strerror})") from None


def _read(run: Path) -> RunFiles:
    lines = _lines(run / STATUS_FILE)
    settings = _settings(run)
    metrics = _working_directory(run) / (settings.get("output_dir") or run) / _METRICS_FILE
    events = [event for event in map(_event, _lines(slurm_directory(run) / STARTS)) if event]
    checkpoints = [int(match[1]) for path in run.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    if not (lines or events or checkpoints or metrics.exists() or (slurm_directory(run) / JOBS).exists()):
        raise UserError(f"{run} is not a run: it has no jobs, no metrics.jsonl and no checkpoints")
    train, save, failed = _newest_records(metrics)
    jobs = dict.fromkeys([*_lines(slurm_directory(run) / JOBS), *(event.job for event in events)])
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
    """Settings as submitted, or as the trainer wrote them; {} if they are an older version's."""
    for path in (slurm_directory(run) / SETTINGS_FILE, run / SETTINGS_FILE):
        if path.is_file():
            try:
                return read_yaml(path)
            except UserError:
                continue
    return {}


def _working_directory(run: Path) -> Path:
    """Where relative paths of a run's settings start; this process's directory if the script doesn't say."""
    script = slurm_directory(run) / SCRIPT
    text = script.read_text(encoding="utf-8") if script.is_file() else ""
    return Path(sbatch_option(text, "chdir") or "")


def _event(line: str) -> Event | None:
    words = line.split(maxsplit=4)
    if len(words) < 4 or not words[1].isdecimal():
        return None  # a "by-hand" line, an older version's, or one that was cut off
    token, step, kind, time, *text = words
    return Event(token, int(step), kind, time, "".join(text))


def _newest_records(
    path: Path,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, list[dict[str, Any]]]:
    """The newest records of a step and of a save, and the failed saves after that."""
    train: dict[str, Any] | None = None
    save: dict[str, Any] | None = None
    failed: list[dict[str, Any]] = []
    for line in _lines_backwards(path):
        try:
            record = strict_json.loads(line)
            kind = record["kind"]
        except (ValueError, TypeError, KeyError):
            continue  # cut off: the last line, which is being written, or one at which the run was killed
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
    """The lines of a file, the last one first."""
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
