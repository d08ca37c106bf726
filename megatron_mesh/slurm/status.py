"""Shows the state of runs, from their files and, if SLURM answers within seconds, from its queue."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_mesh.config.layout import last_step
from megatron_mesh.config.schema import TrainingConfig
from megatron_mesh.config.settings import read_yaml
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import strict_json
from megatron_mesh.runtime.failures import RUNNING
from megatron_mesh.runtime.run_files import (
    BATCH_SCRIPT,
    CONFIG_FILE,
    JOBS_FILE,
    METRICS_FILE,
    SITE_FILE,
    STARTS_FILE,
    STATUS_FILE,
    checkpoint_step,
)
from megatron_mesh.slurm.commands import STATUS_SECONDS, SlurmJob, find_jobs
from megatron_mesh.slurm.script import sbatch_option, slurm_directory
from megatron_mesh.slurm.site import read_site

UNFINISHED = 75
"""Exit status of a job whose run can be resumed (``job.sh``)."""
_ENDS = {"done": "done", "stopped": "stopped", "failed": "failed", "given-up": "failed"}

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
    """``start``, or how it ended: done, stopped, failed, given-up, ended (by SLURM) or resumes."""
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
        settings: the settings as in YAML; empty if no file with settings can be read.
        train: the newest record of a training step in metrics.jsonl.
        save: the newest record of a saved checkpoint in metrics.jsonl.
        failed_saves: records of failed saves after ``save``, oldest first.
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
        """The step at which the run will end, judging from its newest step; None if settings are missing."""
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
    """Return the settings as submitted, or as the trainer wrote them; {} if neither file can be read."""
    for path in (slurm_directory(run) / CONFIG_FILE, run / CONFIG_FILE):
        if path.is_file():
            try:
                return read_yaml(path)
            except UserError:
                continue
    return {}


def _working_directory(run: Path) -> Path:
    """Return the directory to which relative paths in the settings refer: the jobs', or "" if unknown."""
    script = slurm_directory(run) / BATCH_SCRIPT
    text = script.read_text(encoding="utf-8") if script.is_file() else ""
    return Path(sbatch_option(text, "chdir") or "")


def _event(line: str) -> Event | None:
    words = line.split(maxsplit=4)
    if len(words) < 4 or not words[1].isdecimal():
        return None  # a "by-hand" line, a truncated line, or one from an older version
    token, step, kind, time, *text = words
    return Event(token, int(step), kind, time, "".join(text))


def _newest_records(
    path: Path,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, list[dict[str, Any]]]:
    """Return the newest record of a step, the newest of a save, and those of failed saves after it."""
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
    """Yield the lines of a file, last line first."""
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


@dataclass(frozen=True)
class Status:
    """The state of a run according to its files and SLURM.

    Attributes:
        jobs: the run's jobs that SLURM still knows.
        slurm_error: why SLURM did not answer; "" if it did.
    """

    files: RunFiles
    jobs: list[SlurmJob]
    slurm_error: str

    @property
    def state(self) -> str:
        """One of not started, waiting, running, suspended, stopped, failed, done or interrupted.

        A run is interrupted if its jobs are gone and no file says how it ended: it was killed or cancelled.
        """
        if self.files.status == "done":
            return "done"
        for state, matches in (
            ("running", [job.is_running for job in self.jobs]),
            ("suspended", [job.is_suspended for job in self.jobs]),
            ("waiting", [job.is_waiting for job in self.jobs]),
        ):
            if any(matches):
                return state
        if self.files.status not in (RUNNING, "not started") or self.slurm_error or not self.files.jobs:
            return self.files.status
        return _ENDS.get(self.files.event.kind, "interrupted") if self.files.event else self.files.status


def read_statuses(runs: Sequence[Path]) -> list[Status]:
    """Read the state of each run. SLURM is asked once for all of them.

    Raises:
        UserError: one of the paths is not the directory of a run.
    """
    found = [read_files(run) for run in runs]
    known: dict[str, SlurmJob] = {}
    slurm_error = ""
    try:
        known = find_jobs([job for files in found for job in files.jobs], seconds=STATUS_SECONDS)
    except UserError as error:
        slurm_error = str(error)
    return [Status(files, [known[job] for job in files.jobs if job in known], slurm_error) for files in found]


def as_json(found: Sequence[Status]) -> str:
    """Return a JSON list with one object per run."""
    return strict_json.dumps([_object(status) for status in found], indent=2, ensure_ascii=False)


def _object(status: Status) -> dict[str, Any]:
    files, train, event = status.files, status.files.train or {}, status.files.event
    return {
        "run": str(files.run),
        "state": status.state,
        "causes": files.causes,
        "step": train.get("step"),
        "loss": train.get("loss"),
        "last_step": files.last_step,
        "updated": files.updated.isoformat(timespec="seconds") if files.updated else None,
        "checkpoint": files.checkpoint,
        "steps_at_risk": files.steps_at_risk,
        "last_save_seconds": (files.save or {}).get("seconds"),
        "failed_saves": [
            {"step": each.get("step"), "reason": each.get("reason")} for each in files.failed_saves
        ],
        "last_event": event
        and {"job": event.job, "kind": event.kind, "time": event.time, "text": event.text},
        "jobs": [
            {
                "job": job.number,
                "state": job.state,
                "reason": job.reason,
                "nodes": job.nodes,
                "run_time": job.run_time,
                "time_limit": job.time_limit,
                "restarts": job.restarts,
                "exit_status": job.exit_status,
            }
            for job in status.jobs
        ],
        "forgotten_jobs": []
        if status.slurm_error
        else sorted({*files.jobs} - {job.number for job in status.jobs}),
        "slurm": status.slurm_error or "answered",
    }


def as_text(status: Status) -> str:
    """Describe one run, one fact per line."""
    files = status.files
    rows = [("run", str(files.run)), ("state", status.state), *(("cause", cause) for cause in files.causes)]
    if files.event:
        rows.append(("last event", f"{files.event.text} (job {files.event.job}, {files.event.time})"))
    rows += [(f"job {job.number}", _job_text(job)) for job in status.jobs]
    if status.slurm_error:
        rows.append(("slurm", f"{status.slurm_error}; only the run's files were read"))
    elif not status.jobs:
        forgotten = f"SLURM no longer knows {', '.join(files.jobs[-3:])}"
        rows.append(("jobs", forgotten if files.jobs else "none: this run was not started on SLURM"))
    return "\n".join(_aligned([*rows, *_progress(files)]))


def _progress(files: RunFiles) -> list[tuple[str, str]]:
    total = "" if files.last_step is None else f" of {files.last_step:,}"
    if files.train is None:
        rows = [("step", f"none yet{total}")]
    else:
        loss = files.train.get("loss")
        shown = "not finite" if loss is None else f"{loss:.4f}"
        rows = [("step", f"{files.train['step']:,}{total}, loss {shown}, at {files.updated:%F %T}")]
    rows.append(("checkpoint", "none yet" if files.checkpoint is None else f"step {files.checkpoint:,}"))
    rows.append(("at risk", f"{files.steps_at_risk:,} steps since the newest checkpoint"))
    if files.save is not None:
        rows.append(("last save", f"{files.save['seconds']:.1f} s{_save_hint(files)}"))
    if files.failed_saves:
        newest = files.failed_saves[-1]
        rows.append(
            (
                "failed saves",
                f"{len(files.failed_saves)} since then, at step {newest['step']:,}: {newest['reason']}",
            )
        )
    return rows


def _save_hint(files: RunFiles) -> str:
    path = slurm_directory(files.run) / SITE_FILE
    if files.save is None or not path.is_file():
        return ""
    try:
        limit = read_site(path).save_seconds
    except UserError:
        return ""  # the site file may be valid only on the cluster; the hint is not worth an error
    return (
        f": longer than the site file's SAVE_SECONDS={limit}; raise it"
        if files.save["seconds"] > limit
        else ""
    )


def as_table(found: Sequence[Status]) -> str:
    """Return a table with one line per run."""
    rows = [("run", "state", "step", "of", "loss", "checkpoint", "at risk", "jobs")]
    for status in found:
        files, train = status.files, status.files.train or {}
        loss = train.get("loss")
        jobs = [f"{job.number} {job.state}" for job in status.jobs if not job.is_over] or files.jobs[-1:]
        values = (train.get("step"), files.last_step, loss, files.checkpoint)
        step, total, _, checkpoint = ("-" if value is None else f"{value:,}" for value in values)
        shown = "-" if loss is None else f"{loss:.4f}"
        failed = f" ({len(files.failed_saves)} saves failed)" if files.failed_saves else ""
        risk = f"{files.steps_at_risk:,}{failed}"
        rows.append(
            (str(files.run), status.state, step, total, shown, checkpoint, risk, ", ".join(jobs) or "-")
        )
    lines = _aligned(rows)
    slurm_error = next((status.slurm_error for status in found if status.slurm_error), "")
    if slurm_error:
        lines.append(f"slurm: {slurm_error}; only the runs' files were read")
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _job_text(job: SlurmJob) -> str:
    parts = [job.state if job.reason in ("None", "") else f"{job.state} ({job.reason})"]
    if job.is_over and job.exit_status == UNFINISHED:
        parts = [f"{job.state}: ended before the end of the run (exit status {UNFINISHED})"]
    if job.is_running:
        parts.append(f"on {job.nodes}, {job.run_time} of {job.time_limit}")
    if job.restarts:
        parts.append(f"restarted {job.restarts} times")
    return ", ".join(parts)
