"""Run SLURM's commands and parse their output."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mesh.errors import UserError

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
SUSPENDED = ("SUSPENDED", "STOPPED")
OVER = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT"),
)
CHANGING = ("CONFIGURING", "POWER_UP_NODE", "COMPLETING", "STAGE_OUT")
"""States in which a batch script cannot react to signals: its nodes are being prepared, or it is ending."""
STATUS_SECONDS = 5.0
"""How long --status waits for SLURM's answer before it shows the files alone."""

_KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
_DROPPED_PREFIXES = (
    *("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SALLOC_"),
    *("SQUEUE_", "SCANCEL_", "SINFO_", "SCONTROL_"),
)
_FIELDS = (
    "JobArrayID",
    "State",
    "Reason",
    "NodeList",
    "TimeUsed",
    "TimeLimit",
    "RestartCnt",
    "exit_code",
    "JobID",
)


@dataclass(frozen=True)
class SlurmJob:
    """A job as squeue reports it. ``number`` is ARRAY_INDEX for an element of an array."""

    number: str
    state: str
    reason: str
    nodes: str
    run_time: str
    time_limit: str
    restarts: int
    exit_status: int

    @property
    def is_waiting(self) -> bool:
        """Whether the job is in the queue."""
        return self.state in WAITING

    @property
    def is_running(self) -> bool:
        """Whether the job has nodes and its processes may run. Unknown states count as running."""
        return not (self.is_waiting or self.is_suspended or self.is_over)

    @property
    def is_suspended(self) -> bool:
        """Whether the job's processes exist but are stopped."""
        return self.state in SUSPENDED

    @property
    def is_over(self) -> bool:
        """Whether the job has ended for good."""
        return self.state in OVER


def slurm(*command: str, seconds: float = 60) -> str:
    """Run one command, without input and without options from the environment, and return its output.

    Raises:
        UserError: the command is not installed here, fails, or does not answer within ``seconds``.
    """
    try:
        ended = subprocess.run(
            command,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except (FileNotFoundError, PermissionError):
        raise UserError(
            f"{command[0]} is not installed on this machine; use one that has SLURM's commands"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]} did not answer within {seconds:g} s; sinfo shows whether SLURM's controller is up"
        ) from None
    if ended.returncode:
        reason = (ended.stderr.strip() or "no reason given").splitlines()[0]
        raise UserError(f"{command[0]} refused: {reason}")
    return ended.stdout


def _environment() -> dict[str, str]:
    """This process's environment without an outer job's variables and options of SLURM's commands."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT_VARIABLES or not name.startswith(_DROPPED_PREFIXES)
    }


def warn_about_unused_options() -> None:
    """Warn about sbatch options in the environment: only the site file sets options."""
    for name, value in os.environ.items():
        if name.startswith("SBATCH_"):
            print(
                f"note: {name}={value} is ignored; set sbatch options in the site file's SBATCH_OPTIONS",
                file=sys.stderr,
            )


def submit(script: Path, chain: int, *options: str) -> list[str]:
    """Submit a batch script ``chain`` times, each job starting after the previous; return the numbers."""
    jobs: list[str] = []
    for _ in range(chain):
        # Not --dependency=singleton: that would also wait for other runs of the same name.
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        try:
            answer = slurm("sbatch", "--parsable", *options, *after, str(script))
        except BaseException:  # Ctrl-C too
            cancel_jobs(jobs)
            raise
        jobs.append(answer.split()[-1].split(";")[0])
    return jobs


def cancel_jobs(jobs: Sequence[str]) -> None:
    """Cancel jobs, the last ones first, so that no job of a chain starts because its predecessor is gone."""
    for job in reversed(jobs):
        slurm("scancel", job)


def find_jobs(jobs: Sequence[str], seconds: float = 60) -> dict[str, SlurmJob]:
    """Look up jobs with one call of squeue. Jobs that SLURM no longer knows are left out; the order stays.

    Raises:
        UserError: SLURM does not answer within ``seconds``.
    """
    if not jobs:
        return {}
    columns = ",".join(f"{name}:|" for name in _FIELDS)
    # squeue fails for a single unknown number but leaves it out of several, so name the first job twice.
    numbers = ",".join([*jobs, jobs[0]])
    try:
        answer = slurm("squeue", "-h", "-r", "-t", "all", "-j", numbers, "-O", columns, seconds=seconds)
    except UserError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    found = {}
    for line in filter(None, map(str.strip, answer.splitlines())):
        number, state, reason, nodes, used, limit, restarts, status, _ = line.split("|")[: len(_FIELDS)]
        exit_status = int(status) >> 8 & 255 if status.isdecimal() else 0
        found[number] = SlurmJob(number, state, reason, nodes, used, limit, int(restarts or 0), exit_status)
    return {number: found[number] for number in jobs if number in found}


def kill_wait_and_grace(partition: str | None) -> tuple[int, int]:
    """Seconds from SIGTERM to SIGKILL (KillWait), and those that preemption adds (GraceTime)."""
    kill_wait = re.search(r"^KillWait\s*=\s*(\d+)", slurm("scontrol", "show", "config"), re.MULTILINE)
    partitions = [
        _fields(line) for line in slurm("scontrol", "-o", "show", "partition").splitlines() if line.strip()
    ]
    ours = [
        each
        for each in partitions
        if (each.get("PartitionName") == partition if partition else each.get("Default") == "YES")
    ]
    grace = int(ours[0].get("GraceTime", "0")) if ours else 0
    return int(kill_wait[1]) if kill_wait else 30, grace


def _fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)
