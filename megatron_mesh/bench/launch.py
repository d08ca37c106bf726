"""Start the ranks of a measurement on this machine, as torchrun does."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.launcher import LaunchConfig, elastic_launch

from megatron_mesh.runtime import device
from megatron_mesh.runtime.console import show_messages
from megatron_mesh.runtime.distributed import is_rank_zero

Result = TypeVar("Result")


def on_ranks(ranks: int, work: Callable[..., Result], *args: object) -> list[Result]:
    """Call ``work(*args)`` in as many new processes, where torch.distributed is initialized.

    Args:
        work: a function of a module, which the processes import.

    Returns:
        What it returned, by rank.

    Raises:
        torch.distributed.elastic.multiprocessing.errors.ChildFailedError: a process failed; its traceback is
            on stderr.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="bench",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    results = elastic_launch(settings, _work)(work, *args)
    return [results[rank] for rank in range(ranks)]


def progress(text: str) -> None:
    """Say on stderr, once for all ranks, what comes next."""
    if is_rank_zero():
        print(text, file=sys.stderr, flush=True)


def _work(work: Callable[..., Result], *args: object) -> Result:
    show_messages(speaks=False)
    device.prepare()
    dist.init_process_group(device.backend())
    try:
        return work(*args)
    finally:
        dist.destroy_process_group()
