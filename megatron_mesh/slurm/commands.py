"""SLURM's commands."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megatron_mesh.errors import UserError

WAITING, RUNNING = ("PENDING", "REQUEUED", "SUSPENDED"), ("RUNNING", "CONFIGURING", "COMPLETING")


def slurm(*command: str) -> str:
    """The output of one command.

    Raises:
        UserError: it is not installed here, fails, or does not answer within a minute.
    """
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not on this machine; go where SLURM's commands are") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} does not answer; look at SLURM's controller with sinfo") from None
    if ended.returncode:
        reason = (ended.stderr.strip() or "no reason given").splitlines()[0]
        raise UserError(f"{command[0]} refused: {reason}")
    return ended.stdout


def submit(script: Path, chain: int) -> list[int]:
    """Submit a batch script ``chain`` times, each job to start after the one before; their numbers."""
    jobs: list[int] = []
    for _ in range(chain):
        # By number, not by "singleton": another run of the same name need not wait.
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        try:
            answer = slurm("sbatch", "--parsable", *after, str(script))
        except UserError:
            for job in jobs:
                slurm("scancel", str(job))
            raise
        jobs.append(int(answer.split(";")[0]))
    return jobs


def known_jobs(jobs: Sequence[int]) -> dict[int, dict[str, str]]:
    """The fields that ``scontrol show job`` gives, of those jobs that SLURM still knows."""
    found = {}
    for job in jobs:
        try:
            found[job] = _fields(slurm("scontrol", "-o", "show", "job", str(job)))
        except UserError as error:
            if "Invalid job id" not in str(error):
                raise
    return found


def seconds_to_leave(partition: str | None) -> tuple[int, int]:
    """Seconds between a job's SIGTERM and its SIGKILL, and those that the partition's preemption adds."""
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
