"""What torchrun, srun and the system say about this process. Reading it starts nothing."""

import os
import time

import psutil


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
