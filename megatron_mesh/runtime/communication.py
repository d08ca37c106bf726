"""Collectives and sends between the ranks of a job: that they are right, and how fast they are."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mesh.bench.clock import now
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


class WrongResult(RuntimeError):
    """An operation gave something else than it should: hardware, driver or library, never the input."""


def measure(megabytes: float, repeats: int) -> list[Measured]:
    """Check and time each operation; a collective operation of the whole job.

    Raises:
        WrongResult: a result is wrong on some rank; all ranks raise, and the message names these.
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
    host = None if right else f"{dist.get_rank()} on {platform.node()}"
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, host)
    if wrong := [each for each in told if each]:
        more = f" and {len(wrong) - 16} more" if len(wrong) > 16 else ""
        raise WrongResult(f"{name} gave a wrong result on rank {', '.join(wrong[:16])}{more}")


def _seconds(run: Run) -> float:
    dist.barrier()
    start = now()
    run()
    mine = torch.tensor([now() - start], dtype=torch.float64, device=device.device())
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return float(mine.item())


def _filled(count: int, first: float, factor: float = 1) -> Tensor:
    """``first`` + ``factor`` x (0 ... 250, 0 ...): a piece in the wrong place shows, and sums are exact."""
    return first + factor * (torch.arange(count, device=device.device()) % 251).float()


def _sum(count: int) -> Tensor:
    """The sum of ``_filled(count, rank + 1)`` over the ranks."""
    world = dist.get_world_size()
    return _filled(count, world * (world + 1) / 2, world)


def _all_reduce(count: int) -> tuple[Run, Callable[[], bool]]:
    """In place, so the result is checked after the first run, and later ones add up what they find."""
    tensor = _filled(count, dist.get_rank() + 1)
    return partial(dist.all_reduce, tensor), lambda: torch.equal(tensor, _sum(count))


def _all_gather(count: int) -> tuple[Run, Callable[[], bool]]:
    world = dist.get_world_size()
    given, whole = _filled(count // world, dist.get_rank()), torch.zeros(count, device=device.device())
    expected = [_filled(count // world, rank) for rank in range(world)]
    return partial(dist.all_gather_into_tensor, whole, given), lambda: torch.equal(whole, torch.cat(expected))


def _reduce_scatter(count: int) -> tuple[Run, Callable[[], bool]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    given, part = _filled(count, rank + 1), torch.zeros(count // world, device=device.device())
    run = partial(dist.reduce_scatter_tensor, part, given)
    return run, lambda: torch.equal(part, _sum(count).chunk(world)[rank])


def _round(count: int) -> tuple[Run, Callable[[], bool]]:
    """Every rank sends to the next and receives from the one before, as the ring pipeline does."""
    rank, world = dist.get_rank(), dist.get_world_size()
    given, got = _filled(count, rank), torch.zeros(count, device=device.device())
    before, after = (rank - 1) % world, (rank + 1) % world

    def run() -> None:
        operations = [dist.P2POp(dist.isend, given, after), dist.P2POp(dist.irecv, got, before)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()

    return run, lambda: torch.equal(got, _filled(count, before))


_OPERATIONS = {
    "all-reduce": (lambda world: 2 * (world - 1) / world, _all_reduce),
    "all-gather": (lambda world: (world - 1) / world, _all_gather),
    "reduce-scatter": (lambda world: (world - 1) / world, _reduce_scatter),
    "send to the next": (lambda world: 1.0, _round),
}
