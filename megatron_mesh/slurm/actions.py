"""Requeue or cancel a submitted run."""

import os
from pathlib import Path

from megatron_mesh.errors import UserError
from megatron_mesh.runtime.run_files import BATCH_SCRIPT, STARTS_FILE
from megatron_mesh.slurm.commands import CHANGING, SlurmJob, cancel_jobs, find_jobs, slurm, submit
from megatron_mesh.slurm.files import read_files
from megatron_mesh.slurm.script import is_chained, slurm_directory
from megatron_mesh.slurm.submission import record_jobs


class RunAlreadyDone(UserError):
    """The run is already trained to the end."""


def requeue(run: Path, chain: int) -> str:
    """Put a run back in the queue without losing a step, and return a sentence that says what was done.

    A running job saves first. A waiting job stays as it is. If no job is left, the run is submitted again.

    Raises:
        RunAlreadyDone: the run is trained to the end.
        UserError: a job of the run is suspended, starting or ending, or it can't be submitted again.
    """
    files = read_files(run)
    if files.status == "done":
        raise RunAlreadyDone(f"{run} is trained to the end; for more steps start a new run with --load {run}")
    jobs = find_jobs(files.jobs).values()
    for job in jobs:
        if job.is_waiting:
            return f"job {job.number} is already in the queue ({job.state}, {job.reason})"
        if job.is_suspended:
            raise suspended_error(job)
        if job.state in CHANGING:
            raise UserError(
                f"job {job.number} is {job.state} and can't react to signals; try again in a moment"
            )
        if job.is_running:
            # The signal of the early warning: the batch script makes the run save, then requeues itself.
            slurm("scancel", "--batch", "--signal=USR1", job.number)
            in_chain = any(other.is_waiting for other in jobs)
            return f"job {job.number} will save{_next_start(run, in_chain)}; see --status {run}"
    return f"submitted job {', '.join(submit_again(run, chain))}"


def _next_start(run: Path, in_chain: bool) -> str:
    """What happens after a job has saved. ``in_chain`` means that another job waits for its end."""
    script = slurm_directory(run) / BATCH_SCRIPT
    if in_chain:
        return "; the next job of the chain resumes"
    if script.is_file() and is_chained(script.read_text(encoding="utf-8")):
        return "; it is the last of its chain, so run --requeue again when it has ended"
    return " and requeue itself"


def submit_again(run: Path, chain: int) -> list[str]:
    """Submit the batch script in ``RUN/slurm`` and return the job numbers.

    Raises:
        UserError: there is no script, SLURM refuses it, or the directory cannot be written.
    """
    script = slurm_directory(run) / BATCH_SCRIPT
    starts = slurm_directory(run) / STARTS_FILE
    try:
        if script.is_file() or starts.is_file():
            with starts.open("a", encoding="utf-8") as file:
                file.write("by-hand -\n")  # the user knows why the last start ended: forget earlier failures
        if not script.is_file():
            raise UserError(
                f"{run} was not submitted with submit_slurm.py; submit its script again with sbatch (its "
                "earlier failures no longer count)"
            )
        jobs = submit(script, chain)
        try:
            record_jobs(run, jobs)
        except BaseException:  # Ctrl-C too
            cancel_jobs(jobs)
            raise
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be written ({error.strerror}); nothing was submitted"
        ) from None
    return jobs


def cancel(run: Path) -> str:
    """Cancel the jobs of a run, waiting ones first, and return a sentence that says which.

    A running job saves if it manages to within KillWait.
    """
    jobs = [job for job in find_jobs(read_files(run).jobs).values() if not job.is_over]
    if not jobs:
        return f"{run} has no job in the queue"
    cancel_jobs([job.number for job in sorted(jobs, key=lambda job: job.is_waiting)])
    return "cancelled " + ", ".join(f"job {job.number} ({job.state})" for job in jobs)


def suspended_error(job: SlurmJob) -> UserError:
    """The error for a suspended job, which cannot save."""
    return UserError(
        f"job {job.number} is suspended ({job.state}) and cannot save; wake it with "
        f"scontrol resume {job.number}"
    )


def run_directory(path: Path) -> Path:
    """The absolute path. Links stay: the nodes may see their targets under other paths."""
    return Path(os.path.abspath(path))
