"""Collectives and sends between the ranks of a job: that they are right, and how fast they are."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mesh.runtime import device

Run = Callable[[], object]


@dataclass(frozen=True)
class Measured:
    """One operation at one size."""

    name: str
    size: int
    """Bytes of the tensor that the operation is about."""
    seconds: float
    bus_gb_per_second: float
    """As nccl-tests count: what each link would have to carry, whatever the number of ranks."""


def measure(megabytes: float, repeats: int) -> list[Measured]:
    """Check and time each operation; a collective operation of the whole job.

    Raises:
        AssertionError: a result is wrong on some rank; all ranks raise.
    """
    found = []
    for name, (factor, make) in _OPERATIONS.items():
        count = _count(megabytes)
        run, check = make(count)
        run()
        _all_agree(check(), name)  # of the first call: those after it add to what a sum gave
        times = [_seconds(run) for _ in range(repeats)]
        seconds = median(times)
        size = count * 4
        found.append(Measured(name, size, seconds, factor(dist.get_world_size()) * size / seconds / 1e9))
    return found


def _count(megabytes: float) -> int:
    """Elements of 4 bytes, divisible by the number of ranks."""
    world = dist.get_world_size()
    return max(1, round(megabytes * 1e6 / 4 / world)) * world


def _all_agree(right: bool, name: str) -> None:
    wrong = torch.tensor([0 if right else 1], device=device.device())
    dist.all_reduce(wrong)
    assert not wrong.item(), (
        f"{name} gave a wrong result on {int(wrong.item())} of {dist.get_world_size()} ranks"
    )


def _seconds(run: Run) -> float:
    dist.barrier()
    device.synchronize()
    start = time.perf_counter()
    run()
    device.synchronize()
    mine = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=device.device())
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return float(mine.item())


def _filled(count: int, value: float) -> Tensor:
    return torch.full((count,), value, device=device.device())


def _all_reduce(count: int) -> tuple[Run, Callable[[], bool]]:
    world, tensor = dist.get_world_size(), _filled(count, dist.get_rank() + 1)
    return partial(dist.all_reduce, tensor), lambda: bool((tensor == world * (world + 1) / 2).all())


def _all_gather(count: int) -> tuple[Run, Callable[[], bool]]:
    world = dist.get_world_size()
    given, whole = _filled(count // world, dist.get_rank()), _filled(count, -1)
    expected = torch.arange(world, device=whole.device).repeat_interleave(count // world)
    return partial(dist.all_gather_into_tensor, whole, given), lambda: bool((whole == expected).all())


def _reduce_scatter(count: int) -> tuple[Run, Callable[[], bool]]:
    world = dist.get_world_size()
    given, part = _filled(count, dist.get_rank() + 1), _filled(count // world, -1)
    total = world * (world + 1) / 2
    return partial(dist.reduce_scatter_tensor, part, given), lambda: bool((part == total).all())


def _round(count: int) -> tuple[Run, Callable[[], bool]]:
    """Every rank sends to the next and receives from the one before, as the ring pipeline does."""
    rank, world = dist.get_rank(), dist.get_world_size()
    given, got = _filled(count, rank), _filled(count, -1)
    before, after = (rank - 1) % world, (rank + 1) % world

    def run() -> None:
        operations = [dist.P2POp(dist.isend, given, after), dist.P2POp(dist.irecv, got, before)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()

    return run, lambda: bool((got == before).all())


_OPERATIONS = {
    "all-reduce": (lambda world: 2 * (world - 1) / world, _all_reduce),
    "all-gather": (lambda world: (world - 1) / world, _all_gather),
    "reduce-scatter": (lambda world: (world - 1) / world, _reduce_scatter),
    "send to the next": (lambda world: 1.0, _round),
}
