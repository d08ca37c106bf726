"""What torchrun, srun and the system say about this process. Reading it starts nothing."""

import hashlib
import os
import subprocess
import time
from dataclasses import dataclass

import psutil

from megatron_mesh.errors import UserError

_PORTS_TO_TRY = 8


def process_age() -> float:
    """Seconds since this process was started, its imports included."""
    return time.time() - psutil.Process().create_time()


def world_size_from_environment() -> int:
    """Processes of the job; plain python is a world of one."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")))


def rank_from_environment() -> int:
    """Index of this process in the job."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def local_rank_from_environment() -> int:
    """Index of this process on its host; a rank that was started by hand counts as the first."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def agent_holds_store() -> bool:
    """Whether torchrun's agent on the first node holds the job's store. Otherwise rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_holder() -> str:
    """The process that holds the job's store, in words."""
    who = "torchrun's agent" if agent_holds_store() else "rank 0"
    return f"{who} on host {os.environ.get('MASTER_ADDR', '?')} (MASTER_ADDR)"


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of a job find each other."""

    address: str
    """Host of rank 0, or of torchrun's agent that holds the store."""
    ports: tuple[int, ...]
    """Rank 0 listens at the first that is free."""
    given: bool
    """Whether the user or torchrun has given the port, so that there is no other."""
    spare: tuple[int, ...]
    """Where rank 0 tells the others that it cannot listen at the port that was given."""
    job: str
    """The same for all ranks of this start of the job. Other jobs and other starts have another."""


def find_rendezvous() -> Rendezvous:
    """Where this job's ranks meet: as torchrun or the user says, or else from SLURM's job step.

    Without MASTER_PORT the ports follow from job, step, restart and user, so that jobs on the same host
    rarely try the same one, and no start meets what is left of an earlier one.

    Raises:
        UserError: MASTER_ADDR is not set and SLURM does not tell; or MASTER_PORT is not a port.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID")
    parts = [os.environ.get(name, "") for name in names]
    job = "/".join([*parts, str(os.getuid()), str(world_size_from_environment())])
    address, port = os.environ.get("MASTER_ADDR") or _first_host(), os.environ.get("MASTER_PORT")
    ports = _ports_of(job)
    if not port:
        return Rendezvous(address, ports, False, (), job)
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT={port} is not a port; give a number from 1 to 65535, or leave it unset")
    return Rendezvous(address, (int(port),), True, ports, job)


def _ports_of(job: str) -> tuple[int, ...]:
    """Below 32768, from where systems take the ports of outgoing connections."""
    digest = hashlib.sha256(job.encode()).digest()
    numbers = (int.from_bytes(digest[index : index + 4]) for index in range(0, 4 * _PORTS_TO_TRY, 4))
    return tuple(20000 + number % 12000 for number in numbers)


def _first_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    try:
        if nodes is None:
            raise OSError("this is not a SLURM job step")
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"the ranks cannot find each other: MASTER_ADDR is not set ({error}); start with torchrun, or "
            "export MASTER_ADDR, the name of the first node"
        ) from None
