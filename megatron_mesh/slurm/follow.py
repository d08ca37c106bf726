"""Follow the log of a run's job, as ``tail -f`` would, until the job ends."""

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_mesh.errors import UserError
from megatron_mesh.slurm.commands import SlurmJob, find_jobs, slurm
from megatron_mesh.slurm.files import RunFiles, read_files
from megatron_mesh.slurm.script import slurm_directory

_LINES = 20
"""Lines of what was printed before."""
_ASK_SECONDS = 10.0
_BLOCK = 1 << 16
"""Bytes that are read at a time."""


def follow(run: Path, poll_seconds: float = 0.5) -> Iterator[str]:
    """What the current job of a run prints, piece by piece, until SLURM is through with the job.

    The current job is the one that runs, or the next one that waits, or the last one. A requeued job is the
    same job. Why nothing comes (the job waits, SLURM does not answer) goes to stderr.

    Raises:
        UserError: ``run`` is not a run, has had no job, or its log is not known.
    """
    files = read_files(run)
    if not files.jobs:
        raise UserError(f"{run} has no job to follow; its metrics are in metrics.jsonl")
    job, said = _current(files), ""
    path = _log(run, job)
    position, asked, ended = _start(path), 0.0, False
    while True:
        if not ended and time.monotonic() - asked > _ASK_SECONDS:
            ended, news = _look(run, job)
            if news and news != said:
                print(news, file=sys.stderr, flush=True)
            said, asked = news, time.monotonic()
        text, position = _read(path, position, to_the_end=ended)
        if text:
            yield text
        elif ended:
            return
        else:
            time.sleep(poll_seconds)


def _current(files: RunFiles) -> str:
    try:
        known = list(find_jobs(files.jobs).values())
    except UserError:
        return files.jobs[-1]
    for is_current in (lambda job: job.is_running or job.is_suspended, lambda job: job.is_waiting):
        found = [job.number for job in known if is_current(job)]
        if found:
            return found[0]
    return files.jobs[-1]


def _log(run: Path, job: str) -> Path:
    path = slurm_directory(run) / f"{job}.log"
    if path.exists() or (slurm_directory(run) / "jobs.txt").exists():
        return path
    found = re.search(r" StdOut=(.*?)(?: Power=|$)", slurm("scontrol", "-o", "show", "job", job))
    if found is None:
        raise UserError(f"SLURM does not say where job {job} prints; its script's --output does")
    return Path(found[1])


def _look(run: Path, number: str) -> tuple[bool, str]:
    """Whether the job is over, and what there is to say about it."""
    try:
        job: SlurmJob | None = find_jobs([number]).get(number)
    except UserError as error:
        event = read_files(run).event  # without SLURM, its last words
        return event is not None and event.job == number and event.kind not in ("start", "resumes"), str(
            error
        )
    if job is None:
        return True, f"job {number}: SLURM no longer knows it"
    if job.is_waiting or job.is_suspended:
        return False, f"job {number}: {job.state} ({job.reason})"
    return job.is_over, f"job {number}: {job.state}" if job.is_over else ""


def _start(path: Path) -> int:
    """Where the last lines of a file begin."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - _BLOCK))
        tail = file.read(_BLOCK)
    return max(0, end - _BLOCK) + len(tail) - len(b"".join(tail.splitlines(keepends=True)[-_LINES:]))


def _read(path: Path, position: int, *, to_the_end: bool) -> tuple[str, int]:
    """Whole lines from ``position`` on, and the position after them.

    The rest of a line comes only if it is longer than a block, or if nobody will write its end.
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
