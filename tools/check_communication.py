#!/usr/bin/env python
"""Whether the ranks of a job reach each other, compute right sums, and how fast they send.

torchrun --nproc-per-node 8 tools/check_communication.py
srun --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 python tools/check_communication.py --megabytes 1 32 512
CUDA_VISIBLE_DEVICES= torchrun --nproc-per-node 2 tools/check_communication.py   # gloo, without NCCL

NCCL on GPUs, gloo where there are none or they are hidden. Bandwidth is what nccl-tests call bus bandwidth;
time is the slowest rank's.
Exit status 1 where a result is wrong (ranks and hosts are named) or a rank cannot be reached, 2 on bad input.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta

from megatron_mesh.errors import RanksLost, UserError
from megatron_mesh.runtime.environment import (
    rank_from_environment,
    world_size_from_environment,
)
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error


def main(argv: Sequence[str]) -> None:
    """Measure and print a table."""
    arguments = _parser().parse_args(argv)
    if min(arguments.megabytes) <= 0 or arguments.repeats < 1 or arguments.timeout <= 0:
        raise UserError("--megabytes and --timeout must be above 0, and --repeats at least 1")
    if world_size_from_environment() < 2:
        raise UserError("there is one process only; start several, with torchrun or srun")
    import torch.distributed as dist

    from megatron_mesh.bench.communication import WrongResult, measure
    from megatron_mesh.runtime import device
    from megatron_mesh.runtime.rendezvous import find_rendezvous, open_store

    device.prepare()
    rank, ranks = rank_from_environment(), world_size_from_environment()
    timeout = timedelta(seconds=arguments.timeout)
    place = find_rendezvous()
    try:
        store, _ = open_store(place, rank, ranks, timeout)
        store = dist.PrefixStore("communication", store)  # torchrun's has its own keys
        dist.init_process_group(device.backend(), store=store, rank=rank, world_size=ranks, timeout=timeout)
    except (RanksLost, dist.DistError) as error:
        sys.exit(f"error: the ranks did not meet at {place.address} ({str(error).splitlines()[0]})")
    try:
        if dist.get_rank() == 0:
            print(f"{dist.get_world_size()} ranks, {device.backend()}, {device.describe()}")
            print(f"{'operation':<18}{'MB':>8}{'ms':>10}{'GB/s':>8}")
        for size in arguments.megabytes:
            for each in measure(size, arguments.repeats):
                if dist.get_rank() == 0:
                    speed = f"{each.seconds * 1e3:>10.3f}{each.bus_gb_per_second:>8.2f}"
                    print(f"{each.name:<18}{each.size / 1e6:>8.1f}{speed}", flush=True)
        if dist.get_rank() == 0:
            print("all results are right")
    except WrongResult as error:
        sys.exit(f"error: {error}" if dist.get_rank() == 0 else 1)
    finally:
        dist.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="check_communication.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--megabytes", type=float, nargs="+", default=[1, 32], help="sizes of the tensors (default: 1 32)")
    add("--repeats", type=int, default=10, help="timed runs of each operation (default: %(default)s)")
    add("--timeout", type=float, default=60, help="seconds to wait for other ranks (default: %(default)s)")
    return parser


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        if rank_from_environment() == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
