"""Write batch scripts, and read options back from them."""

import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mesh.errors import UserError
from megatron_mesh.runtime.run_files import BATCH_SCRIPT, CODE_FOLDER, CONFIG_FILE, SITE_FILE, SLURM_FOLDER
from megatron_mesh.slurm.site import Site, seconds_of

_NOT_IN_PATHS = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")
"""sbatch --output cannot escape a backslash, and a line of a script cannot hold control characters."""


@dataclass(frozen=True)
class JobRequest:
    """What a submission chooses besides the run's settings and the site file."""

    nodes: int
    chain: int = 1
    """Number of jobs that resume the run one after another; a single job requeues itself instead."""
    code: Path | None = None
    """Directory of the code; None means ``RUN/slurm/code``."""
    directory: Path = field(default_factory=Path.cwd)
    """Working directory of the jobs; relative paths in the settings start there."""


def slurm_directory(run: Path) -> Path:
    """The directory in which a run keeps the files of its jobs."""
    return run / SLURM_FOLDER


def batch_script(run: Path, load: str | None, site: Site, request: JobRequest) -> str:
    """The batch script of a run.

    Args:
        load: the checkpoint to start from (``--load``), or None.

    Raises:
        UserError: the early warning would come before the job's start, or a path cannot be part of a script.
    """
    if site.environment != "venv" and re.search("[:,]", str(run)):
        raise UserError(
            f"--save {run}: a container cannot mount a path with a colon or comma; choose another"
        )
    lines = _head(site, request, run.name, f"{_pattern(slurm_directory(run))}/%j.log")
    code = f'"$RUN/{SLURM_FOLDER}/{CODE_FOLDER}"' if request.code is None else shlex.quote(str(request.code))
    lines += [f"RUN={shlex.quote(str(run))}", f"CODE={code}", f'SITE="$RUN/{SLURM_FOLDER}/{SITE_FILE}"']
    lines += [f'SETTINGS=(--config "$RUN/{SLURM_FOLDER}/{CONFIG_FILE}")']
    if load is not None and load != str(run):
        lines += [f"LOAD={shlex.quote(load)}"]
    if request.chain > 1:
        lines += ["REQUEUE=no # the next job of the chain resumes"]
    return "\n".join([*lines, f'. "$RUN/{SLURM_FOLDER}/job.sh"', ""])


def array_script(top: Path, count: int, site: Site, request: JobRequest, at_once: int | None) -> str:
    """The batch script of a sweep of ``count`` runs; element N runs and logs in ``top/slurm/N``."""
    lines = _head(site, request, top.name, f"{_pattern(slurm_directory(top))}/%a/%A_%a.log")
    limit = f"%{at_once}" if at_once else ""
    lines.insert(1, f"#SBATCH --array=0-{count - 1}{limit}")
    return "\n".join(
        [*lines, f'. {shlex.quote(str(slurm_directory(top)))}/"$SLURM_ARRAY_TASK_ID"/{BATCH_SCRIPT}', ""]
    )


def sbatch_option(script: str, name: str) -> str | None:
    """The first value of an ``#SBATCH`` option in a script: the tool's, which precedes the site's."""
    found = re.search(rf"^#SBATCH --{name}=(.*)$", script, re.MULTILINE)
    return " ".join(shlex.split(found[1])) if found else None


def is_chained(script: str) -> bool:
    """Whether the next job of a chain resumes the run, instead of the job itself."""
    return re.search("^REQUEUE=no", script, re.MULTILINE) is not None


def _head(site: Site, request: JobRequest, name: str, output: str) -> list[str]:
    if seconds_of(site.time_limit) <= site.warning_seconds:
        raise UserError(
            f"the time limit {site.time_limit} is too short: the early warning comes "
            f"{site.warning_seconds} s before it (2 x SAVE_SECONDS + 60); raise --time"
        )
    options = [
        f"--job-name={name}",
        f"--nodes={request.nodes}",
        f"--ntasks-per-node={site.gpus_per_node}",
        f"--gpus-per-node={site.gpus_per_node}",
        f"--cpus-per-task={site.cpus_per_task}",
        f"--time={site.time_limit}",
        "--requeue",
        "--open-mode=append",
        f"--signal=B:USR1@{site.warning_seconds}",
        f"--output={output}",
        f"--chdir={request.directory}",
        *site.sbatch_options,
    ]
    return ["#!/usr/bin/env bash", *(f"#SBATCH {line}" for line in _quoted(options))]


def _quoted(options: Iterable[str]) -> Iterable[str]:
    """Quote options as sbatch expects them in a script, which is as in a shell."""
    for option in options:
        if _NOT_IN_PATHS.search(option.replace("\\", "")):
            raise UserError(f"{option!r} cannot be part of a batch script; remove the control characters")
        name, equals, value = option.partition("=")
        yield name + equals + (shlex.quote(value) if value else "") if equals else shlex.quote(option)


def _pattern(path: Path) -> str:
    """Escape a path for --output, in which SLURM replaces patterns such as %j."""
    if _NOT_IN_PATHS.search(str(path)):
        raise UserError(
            f"--save {str(path.parent)!r} has a backslash or a control character, which SLURM cannot handle "
            "in the path of a log; choose another path"
        )
    return str(path).replace("%", "%%")


def slow_save_note(site: Site, seconds: tuple[int, int]) -> str | None:
    """A note for the user if a save may take longer than the time between SIGTERM and SIGKILL, or None.

    Args:
        seconds: KillWait, and the GraceTime that preemption adds to it.
    """
    kill_wait, grace = seconds
    if site.save_seconds <= kill_wait:
        return None
    preempted = f", {kill_wait + grace} s at preemption" if grace else ""
    return (
        f"a save takes up to {site.save_seconds} s, but SLURM kills a job {kill_wait} s after it asks it "
        f"to end (KillWait){preempted}; if a save takes longer, the run resumes from the last checkpoint of "
        f"--save-interval or of the early warning, {math.ceil(site.warning_seconds / 60)} minutes before the "
        "time limit"
    )
