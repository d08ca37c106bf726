"""What torchrun, srun and the system say about this process. Reading it starts nothing."""

import os
import subprocess
import time

import psutil

from megatron_mesh.errors import UserError


def process_age() -> float:
    """Seconds since this process was started, its imports included."""
    return time.time() - psutil.Process().create_time()


def world_size_from_environment() -> int:
    """Processes of the job; plain python is a world of one."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")))


def rank_from_environment() -> int:
    """Index of this process in the job."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def agent_holds_store() -> bool:
    """Whether torchrun's agent on the first node holds the job's store. Otherwise rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_holder() -> str:
    """The process that holds the job's store, in words."""
    who = "torchrun's agent" if agent_holds_store() else "rank 0"
    return f"{who} on host {os.environ.get('MASTER_ADDR', '?')} (MASTER_ADDR)"


def find_rendezvous() -> None:
    """Make sure that MASTER_ADDR and MASTER_PORT are set: by torchrun, the user, or from SLURM's job step.

    The port differs between jobs and between restarts of one, so that none meets another's leftovers.

    Raises:
        UserError: they are not set and SLURM does not tell.
    """
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    try:
        if nodes is None:
            raise OSError("this is no SLURM job step")
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True
        ).stdout.split()
        os.environ.setdefault("MASTER_ADDR", hosts[0])
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"the ranks cannot find each other: MASTER_ADDR and MASTER_PORT are not set ({error}); start "
            "with torchrun, or export the name of the first node and a free port"
        ) from None
    job, restart = (int(os.environ.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
    os.environ.setdefault("MASTER_PORT", str(20000 + (job * 8 + restart % 8) % 10000))
