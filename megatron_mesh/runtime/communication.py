"""Check that collectives and sends between the ranks of a job are correct, and measure their bandwidth."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mesh.runtime import device

Call = Callable[[], object]


@dataclass(frozen=True)
class Measurement:
    """One operation at one size."""

    name: str
    size: int
    """Bytes of the tensor that is reduced, gathered, scattered or sent."""
    seconds: float
    bus_gb_per_second: float
    """Bus bandwidth as defined by nccl-tests: the load per link, comparable for any number of ranks."""


class WrongResult(RuntimeError):
    """An operation returned a wrong result, because of the hardware, a driver or a library."""


def measure_operations(megabytes: float, repeats: int) -> list[Measurement]:
    """Check and time each operation. All ranks must call this together.

    Raises:
        WrongResult: a result is wrong on some rank. All ranks raise it, and the message names the faulty
        ones.
    """
    found = []
    for name, (factor, make) in _OPERATIONS.items():
        count = _count(megabytes)
        run, check = make(count)
        run()
        _raise_if_wrong(check(), name)  # now, because repeated all-reduces add up
        times = [_seconds(run) for _ in range(repeats)]
        seconds = median(times)
        size = count * 4
        found.append(Measurement(name, size, seconds, factor(dist.get_world_size()) * size / seconds / 1e9))
    return found


def _count(megabytes: float) -> int:
    """Return the number of float32 elements, rounded to a multiple of the number of ranks."""
    world = dist.get_world_size()
    return max(1, round(megabytes * 1e6 / 4 / world)) * world


def _raise_if_wrong(right: bool, name: str) -> None:
    host = None if right else f"{dist.get_rank()} on {platform.node()}"
    hosts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, host)
    if wrong := [each for each in hosts if each]:
        more = f" and {len(wrong) - 16} more" if len(wrong) > 16 else ""
        raise WrongResult(f"{name} gave a wrong result on rank {', '.join(wrong[:16])}{more}")


def _seconds(run: Call) -> float:
    """Time one call, on the slowest rank."""
    dist.barrier()
    start = _now()
    run()
    mine = torch.tensor([_now() - start], dtype=torch.float64, device=device.device())
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return float(mine.item())


def _now() -> float:
    device.synchronize()
    return time.perf_counter()


def _filled(count: int, first: float, factor: float = 1) -> Tensor:
    """Return ``first`` + ``factor`` x (0 ... 250, 0 ...): it reveals misplaced pieces, and sums are exact."""
    return first + factor * (torch.arange(count, device=device.device()) % 251).float()


def _sum(count: int) -> Tensor:
    """Return the sum of ``_filled(count, rank + 1)`` over the ranks."""
    world = dist.get_world_size()
    return _filled(count, world * (world + 1) / 2, world)


def _all_reduce(count: int) -> tuple[Call, Callable[[], bool]]:
    """Sum in place. Only the first call gives the expected result."""
    tensor = _filled(count, dist.get_rank() + 1)
    return partial(dist.all_reduce, tensor), lambda: torch.equal(tensor, _sum(count))


def _all_gather(count: int) -> tuple[Call, Callable[[], bool]]:
    world = dist.get_world_size()
    given, whole = _filled(count // world, dist.get_rank()), torch.zeros(count, device=device.device())
    expected = [_filled(count // world, rank) for rank in range(world)]
    return partial(dist.all_gather_into_tensor, whole, given), lambda: torch.equal(whole, torch.cat(expected))


def _reduce_scatter(count: int) -> tuple[Call, Callable[[], bool]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    given, part = _filled(count, rank + 1), torch.zeros(count // world, device=device.device())
    run = partial(dist.reduce_scatter_tensor, part, given)
    return run, lambda: torch.equal(part, _sum(count).chunk(world)[rank])


def _send_around(count: int) -> tuple[Call, Callable[[], bool]]:
    """Send to the next rank and receive from the previous one, as the ring pipeline does."""
    rank, world = dist.get_rank(), dist.get_world_size()
    given, got = _filled(count, rank), torch.zeros(count, device=device.device())
    previous, following = (rank - 1) % world, (rank + 1) % world

    def run() -> None:
        operations = [dist.P2POp(dist.isend, given, following), dist.P2POp(dist.irecv, got, previous)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()

    return run, lambda: torch.equal(got, _filled(count, previous))


_OPERATIONS = {
    "all-reduce": (lambda world: 2 * (world - 1) / world, _all_reduce),
    "all-gather": (lambda world: (world - 1) / world, _all_gather),
    "reduce-scatter": (lambda world: (world - 1) / world, _reduce_scatter),
    "send to the next": (lambda world: 1.0, _send_around),
}
