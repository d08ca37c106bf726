"""Requeue or cancel a run that has been submitted."""

import os
from pathlib import Path

from megatron_mesh.errors import UserError
from megatron_mesh.slurm.commands import CHANGING, SlurmJob, find_jobs, slurm, submit, cancel_jobs
from megatron_mesh.slurm.files import read_files
from megatron_mesh.slurm.script import SCRIPT, slurm_directory, is_chained
from megatron_mesh.slurm.submission import STARTS, record_jobs


class RunAlreadyDone(UserError):
    """The run is trained to the end."""


def requeue(run: Path, chain: int) -> str:
    """Put a run back in the queue without losing a step; returns what was done, in words.

    A running job saves first, a waiting one is left alone, and one that is over is submitted again.

    Raises:
        RunAlreadyDone: the run is trained to the end.
        UserError: a job of it is suspended, starting or ending, or it can't be submitted again.
    """
    files = read_files(run)
    if files.status == "done":
        raise RunAlreadyDone(f"{run} is trained to the end; for more steps start a new run with --load {run}")
    jobs = find_jobs(files.jobs).values()
    for job in jobs:
        if job.is_waiting:
            return f"job {job.number} is in the queue already ({job.state}, {job.reason})"
        if job.is_suspended:
            raise suspended(job)
        if job.state in CHANGING:
            raise UserError(f"job {job.number} is {job.state}, so it does not listen; ask again in a moment")
        if job.is_running:
            # The batch script's early warning: it has the run saved, and requeues itself.
            slurm("scancel", "--batch", "--signal=USR1", job.number)
            in_chain = any(other.is_waiting for other in jobs)
            return f"job {job.number} will save{_next_start(run, in_chain)}; see --status {run}"
    return f"submitted job {', '.join(submit_again(run, chain))}"


def _next_start(run: Path, in_chain: bool) -> str:
    """What happens after a job has saved; ``in_chain``: another one waits for its end."""
    script = slurm_directory(run) / SCRIPT
    if in_chain:
        return "; the next job of the chain resumes"
    if script.is_file() and is_chained(script.read_text(encoding="utf-8")):
        return "; it is the last of its chain, so ask again when it has ended"
    return " and requeue itself"


def submit_again(run: Path, chain: int) -> list[str]:
    """Submit the batch script in ``RUN/slurm``; the jobs' numbers.

    Raises:
        UserError: there is none, SLURM refuses, or the directory cannot be written.
    """
    script = slurm_directory(run) / SCRIPT
    starts = slurm_directory(run) / STARTS
    try:
        if script.is_file() or starts.is_file():
            with starts.open("a", encoding="utf-8") as file:
                file.write("by-hand -\n")  # the user has seen why the last start ended
        if not script.is_file():
            raise UserError(
                f"{run} was not submitted with submit_slurm.py, so submit its script again with sbatch; its "
                "failures so far no longer count"
            )
        jobs = submit(script, chain)
        try:
            record_jobs(run, jobs)
        except BaseException:  # Ctrl-C too
            cancel_jobs(jobs)
            raise
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be written ({error.strerror}), so nothing was submitted; fix that"
        ) from None
    return jobs


def cancel(run: Path) -> str:
    """Cancel the jobs of a run, those that wait for others first; returns what was done, in words.

    A running job saves if it can within KillWait.
    """
    jobs = [job for job in find_jobs(read_files(run).jobs).values() if not job.is_over]
    if not jobs:
        return f"{run} has no job in the queue"
    cancel_jobs([job.number for job in sorted(jobs, key=lambda job: job.is_waiting)])
    return "cancelled " + ", ".join(f"job {job.number} ({job.state})" for job in jobs)


def suspended(job: SlurmJob) -> UserError:
    """The error for a job that cannot act because it is suspended."""
    return UserError(
        f"job {job.number} is suspended ({job.state}), so it cannot save; let it run again with "
        f"scontrol resume {job.number}"
    )


def run_directory(path: Path) -> Path:
    """The absolute path without following links: nodes may see the target elsewhere."""
    return Path(os.path.abspath(path))
