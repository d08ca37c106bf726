"""Processes and their groups: start, layout, end."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_mesh.config.schema import ParallelConfig
from megatron_mesh.runtime import device
from megatron_mesh.runtime.environment import rank_from_environment, world_size_from_environment


@contextmanager
def process_groups(parallel: ParallelConfig, seed: int) -> Iterator[None]:
    """Start torch.distributed and Megatron's groups, seed the generators; leave none behind.

    Plain python is a world of one process, which needs no address of anybody.
    """
    device.prepare()
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    world, rank = world_size_from_environment(), rank_from_environment()
    if world == 1:
        dist.init_process_group(
            device.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    else:
        dist.init_process_group(device.backend(), rank=rank, world_size=world, timeout=timeout)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            distributed_timeout_minutes=int(max(1, parallel.distributed_timeout_minutes)),
        )
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def is_rank_zero() -> bool:
    """Whether this process speaks for the job; true before any group exists."""
    return not dist.is_initialized() or dist.get_rank() == 0
