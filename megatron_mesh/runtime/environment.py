"""Read this process's rank and the job's size from the environment, as torchrun or srun set it."""

import os
import time

import psutil

from megatron_mesh.errors import UserError


def process_age() -> float:
    """Seconds since this process started, including its imports."""
    return time.time() - psutil.Process().create_time()


def world_size_from_environment() -> int:
    """Number of processes in the job; 1 with plain python."""
    return _number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", default=1)


def rank_from_environment() -> int:
    """Index of this process in the job."""
    return _number("RANK", "SLURM_PROCID", default=0)


def local_rank_from_environment() -> int:
    """Index of this process on its host; 0 for a rank that was started by hand."""
    return _number("LOCAL_RANK", "SLURM_LOCALID", default=0)


def check_rank() -> None:
    """Raise UserError unless rank and world size are numbers that are consistent."""
    rank, world_size = rank_from_environment(), world_size_from_environment()
    if not 0 <= rank < world_size:
        raise UserError(
            f"this process is rank {rank} of a job of {world_size} processes (RANK and WORLD_SIZE, or "
            "SLURM_PROCID and SLURM_STEP_NUM_TASKS); ranks count from 0: set both variables, or unset both "
            "to train with one process"
        )


def _number(*names: str, default: int) -> int:
    """The value of the first variable that is set.

    Raises:
        UserError: it is not a whole number.
    """
    for name in names:
        if (text := os.environ.get(name)) is None:
            continue
        try:
            return int(text)
        except ValueError:
            raise UserError(f"{name}={text} in the environment is not a whole number; unset it") from None
    return default


def agent_holds_store() -> bool:
    """Whether torchrun's agent on the first node holds the job's store. Otherwise rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_holder() -> str:
    """Describe the process that holds the job's store."""
    who = "torchrun's agent" if agent_holds_store() else "rank 0"
    return f"{who} on host {os.environ.get('MASTER_ADDR', '?')} (MASTER_ADDR)"
