"""Requeue or cancel a submitted run.

Change the nodes or the settings of a submitted run.
"""

import os
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_mesh.arguments import parse_args
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import dump_config, flatten
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.run_files import BATCH_SCRIPT, CONFIG_FILE, SITE_FILE, STARTS_FILE
from megatron_mesh.slurm.commands import CHANGING, SlurmJob, cancel_jobs, find_jobs, slurm, submit
from megatron_mesh.slurm.script import JobRequest, batch_script, is_chained, sbatch_option, slurm_directory
from megatron_mesh.slurm.site import Site, read_site
from megatron_mesh.slurm.status import read_files
from megatron_mesh.slurm.submission import config_for_jobs, record_jobs


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


_COMPARED_OPTIONS = ("nodes", "gpus-per-node", "cpus-per-task", "time")


@dataclass(frozen=True)
class ChangeRequest:
    """The requested change. None leaves a value as it is."""

    settings: Sequence[str]
    site: Path | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    time: str | None = None
    chain: int = 1


@dataclass(frozen=True)
class Change:
    """A change that has been checked but not yet applied.

    Attributes:
        differences: one line for each value that changes.
        waiting: the run's jobs in the queue.
        keeps_jobs: whether the batch script stays the same, so that waiting jobs can keep their place.
    """

    run: Path
    config: Config
    site: Site
    request: JobRequest
    script: str
    differences: list[str]
    waiting: list[SlurmJob]
    keeps_jobs: bool


def plan_change(run: Path, wanted: ChangeRequest, prog: str) -> Change:
    """Check a change like a new submission. Writes nothing.

    Raises:
        UserError: nothing would change, the settings are refused, or the run is running, done or was not
            submitted with the tool.
    """
    paths = [slurm_directory(run) / name for name in (BATCH_SCRIPT, CONFIG_FILE, SITE_FILE)]
    if not all(path.is_file() for path in paths):
        raise UserError(f"{run} was not submitted with submit_slurm.py; change its batch script instead")
    old_script, old_site = (path.read_text(encoding="utf-8") for path in (paths[0], paths[2]))
    waiting = _waiting_jobs(run)
    site = _site(wanted, paths[2], old_script)
    request = _job_request(wanted, old_script, len(waiting))
    if any(word.split("=")[0] == "--config" for word in wanted.settings):
        raise UserError("--change starts from the run's own settings; leave out --config")
    before = parse_args(["--config", str(paths[1])], prog=prog).config
    config = parse_args(["--config", str(paths[1]), *wanted.settings], prog=prog).config
    if config.checkpoint.save != str(run):
        raise UserError(f"--save {config.checkpoint.save} would be another run; leave it out")
    config = config_for_jobs(config, run, site, request.nodes, request.directory)
    script = batch_script(run, config.checkpoint.load, site, request)
    new_site = site.path.read_text(encoding="utf-8")
    differences = [
        *(
            f"{name}: {sbatch_option(old_script, name)} -> {sbatch_option(script, name)}"
            for name in _COMPARED_OPTIONS
        ),
        *(f"{n}: {old} -> {flatten(config)[n]}" for n, old in flatten(before).items()),
    ]
    differences = [line for line in differences if len({*line.partition(": ")[2].split(" -> ")}) > 1]
    old_jobs = max(1, len(waiting))
    more_jobs = wanted.chain > 1 and wanted.chain != old_jobs
    if more_jobs:
        differences.append(f"jobs: {old_jobs} -> {wanted.chain}")
    if new_site != old_site:
        differences.append(f"site file: as {site.path} is now")
    if not differences and script == old_script:
        raise UserError(f"{run} already has these nodes and settings, so nothing changes")
    keeps_jobs = script == old_script and not more_jobs
    return Change(run, config, site, request, script, differences, waiting, keeps_jobs)


def _waiting_jobs(run: Path) -> list[SlurmJob]:
    files = read_files(run)
    if files.status == "done":
        raise UserError(f"{run} is trained to the end; for more steps start a new run with --load {run}")
    jobs = [job for job in find_jobs(files.jobs).values() if not job.is_over]
    for job in jobs:
        if job.is_suspended:
            raise suspended_error(job)
        if job.is_running:
            raise UserError(
                f"job {job.number} of {run} is {job.state}; stop it first: touch {run}/stop saves and ends "
                f"it, --cancel {run} ends it at once"
            )
    return jobs


def _site(wanted: ChangeRequest, path: Path, script: str) -> Site:
    """The site file, with the GPUs and the time limit with which the run was submitted."""
    site = read_site(wanted.site or path)
    gpus, time = sbatch_option(script, "gpus-per-node"), sbatch_option(script, "time")
    return replace(
        site,
        gpus_per_node=wanted.gpus_per_node or int(gpus or site.gpus_per_node),
        time_limit=wanted.time or time or site.time_limit,
    )


def _job_request(wanted: ChangeRequest, script: str, waiting: int) -> JobRequest:
    code = re.search(r'^CODE=(?!"?\$RUN)(.*)$', script, re.MULTILINE)
    return JobRequest(
        nodes=wanted.nodes or int(sbatch_option(script, "nodes") or 1),
        chain=wanted.chain if wanted.chain > 1 or not is_chained(script) else max(2, waiting),
        code=Path(*shlex.split(code[1])) if code else None,
        directory=Path(sbatch_option(script, "chdir") or Path.cwd()),
    )


def apply_change(change: Change) -> str:
    """Apply a change and return a sentence that says what happened to the jobs.

    The earlier files move to ``RUN/slurm/before-N``. New jobs are submitted on hold before the waiting ones
    are cancelled, so if SLURM refuses them, nothing has changed.

    Raises:
        UserError: SLURM refuses the jobs, or the directory cannot be written.
    """
    target = slurm_directory(change.run)
    jobs: list[str] = []
    keeps = change.keeps_jobs and bool(change.waiting)
    # Jobs that the user holds stay held.
    held = [job.number for job in change.waiting if "Held" not in job.reason] if keeps else []
    try:
        _write_next(change, target / "next")
        try:
            if keeps:
                slurm("scontrol", "hold", ",".join(job.number for job in change.waiting))
            else:
                jobs = submit(target / "next" / BATCH_SCRIPT, change.request.chain, "--hold")
            with _swapped(target) as aside:
                with (target / STARTS_FILE).open("a", encoding="utf-8") as file:
                    file.write("by-hand -\n")
                record_jobs(change.run, jobs)
        except BaseException:  # Ctrl-C too
            with suppress(UserError):  # report the first error, not that of the clean-up
                cancel_jobs(jobs)
                _release(held)
            raise
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be written ({error.strerror}); nothing was changed"
        ) from None
    finally:
        shutil.rmtree(target / "next", ignore_errors=True)
    if not keeps:
        cancel_jobs([job.number for job in change.waiting])
    _release(held or jobs)
    return f"{_summary(change, jobs)}; the earlier files are in {aside}"


def _release(jobs: Sequence[str]) -> None:
    if jobs:
        slurm("scontrol", "release", ",".join(jobs))


def _summary(change: Change, jobs: Sequence[str]) -> str:
    old = ", ".join(job.number for job in change.waiting)
    if not jobs:
        return f"job {old} keeps its place in the queue"
    return f"submitted job {', '.join(jobs)}" + (f" in place of {old}" if old else "")


def _write_next(change: Change, target: Path) -> None:
    target.mkdir(exist_ok=True)
    (target / BATCH_SCRIPT).write_text(change.script, encoding="utf-8")
    (target / CONFIG_FILE).write_text(dump_config(change.config), encoding="utf-8")
    site = change.site.path.read_text(encoding="utf-8")
    (target / SITE_FILE).write_text(site, encoding="utf-8")


@contextmanager
def _swapped(target: Path) -> Iterator[Path]:
    """Replace the files of ``target`` with those of ``target/next``, all of them or none.

    Yields:
        A new directory that holds the earlier files. If the body fails, they are put back.
    """
    names = (BATCH_SCRIPT, CONFIG_FILE, SITE_FILE)
    number = 1
    while (aside := target / f"before-{number}").exists():
        number += 1
    aside.mkdir()
    replaced = []
    try:
        for name in names:
            shutil.copy(target / name, aside)
        for name in names:
            replaced.append(name)
            os.replace(target / "next" / name, target / name)
        yield aside
    except BaseException:
        for name in replaced:
            os.replace(aside / name, target / name)
        shutil.rmtree(aside, ignore_errors=True)
        raise
