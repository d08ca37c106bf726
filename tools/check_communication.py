#!/usr/bin/env python
"""Check that the ranks of a job reach each other and compute correct sums, and measure their bandwidth.

    torchrun --nproc-per-node 8 tools/check_communication.py
    srun --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 python tools/check_communication.py --megabytes 1 512
    CUDA_VISIBLE_DEVICES= torchrun --nproc-per-node 2 tools/check_communication.py   # gloo instead of NCCL

Uses NCCL on GPUs, and gloo if there are none or they are hidden. Times are those of the slowest rank.
Bandwidth is the bus bandwidth, as nccl-tests defines it.

Exit status: 1 if a result is wrong (the message names the ranks and their hosts) or if a rank cannot be
reached, 2 on bad input.
"""

import sys
from dataclasses import dataclass
from datetime import timedelta

from megatron_mesh import command
from megatron_mesh.errors import RanksLost, UserError
from megatron_mesh.runtime.environment import (
    rank_from_environment,
    world_size_from_environment,
)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    megabytes: tuple[float, ...] = (1, 32)
    """Tensor sizes in MB."""
    repeats: int = 10
    """Timed calls per operation."""
    timeout: float = 60
    """Seconds to wait for the other ranks."""


def main(options: Options) -> None:
    """Measure, and print a table."""
    if min(options.megabytes) <= 0 or options.repeats < 1 or options.timeout <= 0:
        raise UserError("--megabytes and --timeout must be above 0, and --repeats at least 1")
    if world_size_from_environment() < 2:
        raise UserError("only one process is running; start several with torchrun or srun")
    import torch.distributed as dist

    from megatron_mesh.runtime import device
    from megatron_mesh.runtime.communication import WrongResult, measure_operations
    from megatron_mesh.runtime.rendezvous import find_rendezvous, open_store

    device.prepare()
    rank, ranks = rank_from_environment(), world_size_from_environment()
    timeout = timedelta(seconds=options.timeout)
    rendezvous = find_rendezvous()
    try:
        store, _ = open_store(rendezvous, rank, ranks, timeout)
        store = dist.PrefixStore("communication", store)  # our keys must not clash with torchrun's
        dist.init_process_group(device.backend(), store=store, rank=rank, world_size=ranks, timeout=timeout)
    except (RanksLost, dist.DistError) as error:
        sys.exit(f"error: the ranks did not meet at {rendezvous.address} ({str(error).splitlines()[0]})")
    try:
        if dist.get_rank() == 0:
            print(f"{dist.get_world_size()} ranks, {device.backend()}, {device.describe()}")
            print(f"{'operation':<18}{'MB':>8}{'ms':>10}{'GB/s':>8}")
        for size in options.megabytes:
            for each in measure_operations(size, options.repeats):
                if dist.get_rank() == 0:
                    speed = f"{each.seconds * 1e3:>10.3f}{each.bus_gb_per_second:>8.2f}"
                    print(f"{each.name:<18}{each.size / 1e6:>8.1f}{speed}", flush=True)
        if dist.get_rank() == 0:
            print("all results are correct")
    except WrongResult as error:
        sys.exit(f"error: {error}" if dist.get_rank() == 0 else 1)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    command.run(main, prints_errors=lambda: rank_from_environment() == 0)
