"""What torchrun or srun say of the job, read without starting anything."""

import os


def world_size_from_environment() -> int:
    """Processes of the job; plain python is a world of one."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")))


def rank_from_environment() -> int:
    """Index of this process in the job."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
