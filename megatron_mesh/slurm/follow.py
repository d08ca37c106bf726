"""Follow the log of a run's job, as ``tail -f`` would, until the job ends."""

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_mesh.errors import UserError
from megatron_mesh.runtime.run_files import JOBS_FILE
from megatron_mesh.slurm.commands import SlurmJob, find_jobs, slurm
from megatron_mesh.slurm.script import slurm_directory
from megatron_mesh.slurm.status import RunFiles, read_files

_LINES = 20
"""Start with this many lines of earlier output."""
_ASK_SECONDS = 10.0
"""Ask SLURM for the job's state this often."""
_BLOCK = 1 << 16
"""Read this many bytes at a time."""


def follow(run: Path, poll_seconds: float = 0.5) -> Iterator[str]:
    """Yield the output of a run's current job, piece by piece, until the job ends.

    The current job is the running one, else the first waiting one, else the last one. A requeued job is the
    same job. If there is no output because the job waits or SLURM does not answer, stderr says so.

    Raises:
        UserError: ``run`` is not a run or has had no job, or the path of the log is unknown.
    """
    files = read_files(run)
    if not files.jobs:
        raise UserError(f"{run} has no SLURM job to follow; its metrics are in metrics.jsonl")
    job, printed = _current_job(files), ""
    path = _log_path(run, job)
    position, asked, ended = _tail_position(path), 0.0, False
    while True:
        if not ended and time.monotonic() - asked > _ASK_SECONDS:
            ended, message = _check_job(run, job)
            if message and message != printed:
                print(message, file=sys.stderr, flush=True)
            printed, asked = message, time.monotonic()
        text, position = _read_lines(path, position, to_the_end=ended)
        if text:
            yield text
        elif ended:
            return
        else:
            time.sleep(poll_seconds)


def _current_job(files: RunFiles) -> str:
    try:
        known = list(find_jobs(files.jobs).values())
    except UserError:
        return files.jobs[-1]
    for is_current in (lambda job: job.is_running or job.is_suspended, lambda job: job.is_waiting):
        found = [job.number for job in known if is_current(job)]
        if found:
            return found[0]
    return files.jobs[-1]


def _log_path(run: Path, job: str) -> Path:
    path = slurm_directory(run) / f"{job}.log"
    if path.exists() or (slurm_directory(run) / JOBS_FILE).exists():
        return path
    found = re.search(r" StdOut=(.*?)(?: Power=|$)", slurm("scontrol", "-o", "show", "job", job))
    if found is None:
        raise UserError(f"SLURM does not know the log of job {job}; look for --output in its batch script")
    return Path(found[1])


def _check_job(run: Path, number: str) -> tuple[bool, str]:
    """Whether the job is over, and a message for the user, or ""."""
    try:
        job: SlurmJob | None = find_jobs([number]).get(number)
    except UserError as error:
        event = read_files(run).event
        ended = event is not None and event.job == number and event.kind not in ("start", "resumes")
        return ended, str(error)
    if job is None:
        return True, f"job {number}: SLURM no longer knows it"
    if job.is_waiting or job.is_suspended:
        return False, f"job {number}: {job.state} ({job.reason})"
    return job.is_over, f"job {number}: {job.state}" if job.is_over else ""


def _tail_position(path: Path) -> int:
    """The position at which the last ``_LINES`` lines of a file begin."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - _BLOCK))
        tail = file.read(_BLOCK)
    return max(0, end - _BLOCK) + len(tail) - len(b"".join(tail.splitlines(keepends=True)[-_LINES:]))


def _read_lines(path: Path, position: int, *, to_the_end: bool) -> tuple[str, int]:
    """Read complete lines from ``position``, and return them with the position after them.

    An incomplete line is returned only if it fills a block, or if ``to_the_end`` says that no more will be
    written.
    """
    if not path.exists():
        return "", position
    with path.open("rb") as file:
        file.seek(position)
        found = file.read(_BLOCK)
    whole = found[: found.rfind(b"\n") + 1]
    if not whole and (to_the_end or len(found) == _BLOCK):
        whole = found
    return whole.decode("utf-8", errors="replace"), position + len(whole)
