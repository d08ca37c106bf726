"""Runs that have been submitted: how they stand, and how they go on."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_mesh.config.sources import read_yaml
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.failures import STATUS_FILE
from megatron_mesh.slurm.commands import RUNNING, WAITING, known_jobs, slurm, submit
from megatron_mesh.slurm.site import read_site
from megatron_mesh.slurm.submission import JOBS, SCRIPT, STARTS, folder, note_jobs

_TAIL_BYTES = 1 << 20


def jobs_of(run: Path) -> list[int]:
    """Numbers of the jobs that a run has had.

    Raises:
        UserError: it has not been submitted.
    """
    path = folder(run) / JOBS
    if not path.is_file():
        raise UserError(f"{run} was not submitted with submit_slurm.py: it has no {path.relative_to(run)}")
    return [int(line) for line in path.read_text(encoding="utf-8").split()]


def status_text(run: Path) -> str:
    """How the run and its jobs stand: the last step, its loss, the time of a save."""
    rows = [("run", str(run)), ("state", run_status(run)), *(("cause", cause) for cause in causes(run))]
    known = known_jobs(jobs_of(run))
    rows += [(f"job {number}", _job_text(job)) for number, job in known.items()]
    if not known:
        rows.append(("jobs", "none that SLURM still knows"))
    last, saved = last_records(run)
    settings = read_yaml(folder(run) / "config.yaml")
    if last is None:
        rows.append(("step", f"none yet, of {settings['train_iters']:,}"))
    else:
        rows.append(("step", f"{last['step']:,} of {settings['train_iters']:,}, loss {last['loss']:.4f}"))
    saved_steps = [int(path.name[5:]) for path in run.glob("iter_*") if path.name[5:].isdecimal()]
    rows.append(("checkpoint", f"step {max(saved_steps):,}" if saved_steps else "none yet"))
    if saved is not None:
        limit = read_site(folder(run) / "site.sh").save_seconds
        hint = f": more than the site file's SAVE_SECONDS={limit}, raise it"
        rows.append(("last save", f"{saved['seconds']:.1f} s{hint if saved['seconds'] > limit else ''}"))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def run_status(run: Path) -> str:
    """The word in ``run_status.txt``."""
    return (_status_lines(run) or ["not started"])[0]


def causes(run: Path) -> list[str]:
    """Why the run failed: the further lines of ``run_status.txt``."""
    return _status_lines(run)[1:]


def _status_lines(run: Path) -> list[str]:
    path = run / STATUS_FILE
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []


def last_records(run: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The newest lines of kind "train" and "save" in metrics.jsonl; None where there is none.

    Only the file's last mebibyte is read. Lines may be cut off: the last, which is being written, and those
    at which the run was killed.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        return None, None
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - _TAIL_BYTES)
        file.seek(start)
        lines = file.read().splitlines(keepends=True)[1 if start else 0 :]
    newest: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        newest[record["kind"]] = record
    return newest.get("train"), newest.get("save")


def requeue(run: Path, chain: int) -> str:
    """Put a run back in the queue without losing a step; what was done, in words.

    A running job saves first, a waiting one is left alone, and one that is over is submitted again.

    Raises:
        UserError: the run is trained to the end.
    """
    for number, job in known_jobs(jobs_of(run)).items():
        state = job.get("JobState", "")
        if state in WAITING:
            return f"job {number} is in the queue already ({state}, {job.get('Reason')})"
        if state in RUNNING:
            # The batch script's early warning: it has the run saved, and requeues itself.
            slurm("scancel", "--batch", "--signal=USR1", str(number))
            return f"job {number} is told to save and to go back to the queue; see --status {run}"
    if run_status(run) == "done":
        raise UserError(f"{run} is trained to the end; for more steps start a new run with --load {run}")
    with (folder(run) / STARTS).open("a", encoding="utf-8") as file:
        file.write("by-hand -\n")  # whoever asks for another start has seen why the last one ended
    jobs = submit(folder(run) / SCRIPT, chain)
    note_jobs(run, jobs)
    return f"submitted job {', '.join(map(str, jobs))}"


def _job_text(job: dict[str, str]) -> str:
    state, reason = job.get("JobState", "?"), job.get("Reason", "None")
    parts = [state if reason == "None" else f"{state} ({reason})"]
    if state in RUNNING:
        parts.append(f"on {job.get('NodeList')}, {job.get('RunTime')} of {job.get('TimeLimit')}")
    if job.get("Restarts", "0") != "0":
        parts.append(f"restarted {job['Restarts']} times")
    return ", ".join(parts)


def run_directory(path: Path) -> Path:
    """The absolute path without following links: nodes may see the target elsewhere."""
    return Path(os.path.abspath(path))
