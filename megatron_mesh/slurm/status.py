"""Show the state of runs, from their files and, if SLURM answers within seconds, from its queue."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mesh.errors import UserError
from megatron_mesh.runtime import strict_json
from megatron_mesh.runtime.failures import RUNNING
from megatron_mesh.runtime.run_files import SITE_FILE
from megatron_mesh.slurm.commands import STATUS_SECONDS, SlurmJob, find_jobs
from megatron_mesh.slurm.files import RunFiles, read_files
from megatron_mesh.slurm.script import slurm_directory
from megatron_mesh.slurm.site import read_site

UNFINISHED = 75
"""Exit status of a job whose run can be resumed (``job.sh``)."""
_ENDS = {"done": "done", "stopped": "stopped", "failed": "failed", "given-up": "failed"}


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
    """A JSON list with one object per run."""
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
    """One run, one line per fact."""
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
        return ""  # the site file may be valid only on the cluster, and the hint is optional
    return (
        f": longer than the site file's SAVE_SECONDS={limit}; raise it"
        if files.save["seconds"] > limit
        else ""
    )


def as_table(found: Sequence[Status]) -> str:
    """Several runs, one line each."""
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
