"""How near the memory's weighted sum comes to the bandwidth of a plain copy, forward and backward apart."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_mesh.bench.clock import now
from megatron_mesh.bench.report import Spread
from megatron_mesh.recurrence.memory import Mix
from megatron_mesh.runtime import device

COPY = ("copy", "")
DIRECTIONS = ("forward", "backward")

# (implementation or "copy", direction) -> seconds of one call, an entry a round.
Seconds = Mapping[tuple[str, str], Sequence[float]]


@dataclass(frozen=True)
class Shape:
    """J states [S, B, H] and weights [S, B, J] in float32."""

    sequence: int
    batch: int
    hidden: int
    terms: int
    dtype: torch.dtype

    def least_bytes(self, direction: str) -> int:
        """Bytes that must be moved: every input read once, every output written once."""
        states = {"forward": self.terms + 1, "backward": 2 * self.terms + 1}[direction]
        weights = {"forward": self.terms, "backward": 2 * self.terms}[direction]
        tokens = self.sequence * self.batch
        return tokens * (states * self.hidden * self.dtype.itemsize + weights * 4)


@dataclass(frozen=True)
class Row:
    """Figures of one implementation; a spread is that of the rounds."""

    direction: str
    implementation: str
    least_bytes: int
    milliseconds: Spread
    gigabytes_per_second: Spread
    """The least possible bytes over the time."""
    share_of_copy: Spread
    """That, over what a copy moved per second in the same round. Its inverse is the bytes that a copy could
    have moved in the time, over the least possible."""


def measure(
    shape: Shape, implementations: Mapping[str, Mix], *, rounds: int, calls: int, copy_bytes: int
) -> Seconds:
    """Time each implementation and a copy in turn; the order within a round is drawn anew.

    Args:
        calls: calls under way together in one timing, so that the time to start them is hidden.
        copy_bytes: size of the tensor that is copied (read once, written once).
    """
    work = dict(_work(shape, implementations))
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device.device()).random_()
    target = torch.empty_like(source)
    work[COPY] = lambda: target.copy_(source)
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in work}
    order = random.Random(0)
    for index in range(rounds + 1):
        for name in order.sample(list(work), len(work)):
            measured = _seconds(work[name], calls)
            if index:  # the first round compiles, and takes memory from the device
                seconds[name].append(measured)
    return seconds


def rows(shape: Shape, seconds: Seconds, copy_bytes: int) -> list[Row]:
    """The report on what ``measure`` found, forward first."""
    copied = [2 * copy_bytes / each for each in seconds[COPY]]
    found = []
    ways = [name for name in seconds if name != COPY]
    for name, direction in sorted(ways, key=lambda way: DIRECTIONS.index(way[1])):
        least, times = shape.least_bytes(direction), seconds[name, direction]
        speeds = [least / each for each in times]
        shares = [speed / copy for speed, copy in zip(speeds, copied, strict=True)]
        found.append(
            Row(
                direction,
                name,
                least,
                Spread.of([each * 1e3 for each in times]),
                Spread.of([speed / 1e9 for speed in speeds]),
                Spread.of(shares),
            )
        )
    return found


def _work(
    shape: Shape, implementations: Mapping[str, Mix]
) -> Iterator[tuple[tuple[str, str], Callable[[], object]]]:
    tokens, where = (shape.sequence, shape.batch), device.device()
    weights = torch.randn(*tokens, shape.terms, device=where, requires_grad=True)
    states = [
        torch.randn(*tokens, shape.hidden, device=where).to(shape.dtype).requires_grad_()
        for _ in range(shape.terms)
    ]
    grad = torch.randn(*tokens, shape.hidden, device=where).to(shape.dtype)

    def forward(mix: Mix) -> Tensor:
        with torch.no_grad():
            return mix(weights, states)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, [weights, *states], grad, retain_graph=True)

    for name, mix in implementations.items():
        out = mix(weights, states)
        yield (name, "forward"), partial(forward, mix)
        yield (name, "backward"), partial(backward, out)


def _seconds(work: Callable[[], object], calls: int) -> float:
    start = now()
    for _ in range(calls):
        work()
    return (now() - start) / calls
