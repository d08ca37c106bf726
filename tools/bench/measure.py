"""Wall-clock time of training steps, the variants taking turns."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_mesh.bench.clock import Stopwatch
from megatron_mesh.bench.memory import MemoryMeter
from megatron_mesh.bench.variants import Variant
from megatron_mesh.data import Batch
from megatron_mesh.runtime import device, ranges


@dataclass
class Times:
    """Seconds of each measured step; entry i of every variant is from the same round."""

    forward_backward: list[float] = field(default_factory=list)
    """All micro-batches of the step."""
    communication: list[float] = field(default_factory=list)
    """Reducing the gradients over ranks (here: one), and dividing them by the number of tokens."""
    optimizer: list[float] = field(default_factory=list)
    """Clearing the gradients, their norm and what else ranks agree on, clipping, AdamW, schedule."""

    @property
    def step(self) -> list[float]:
        """All together."""
        parts = (self.forward_backward, self.communication, self.optimizer)
        return [sum(seconds) for seconds in zip(*parts, strict=True)]


def measure(
    variants: Sequence[Variant],
    batches: Sequence[Batch],
    *,
    steps: int,
    warmup: int,
    memory: MemoryMeter,
    seed: int = 0,
    on_step: Callable[[str, Times], None] = lambda name, times: None,
) -> dict[str, Times]:
    """Train every variant for ``warmup + steps`` steps, a step of each per round.

    The order within a round is drawn anew each time. Other load on the machine and its temperature then
    affect all variants alike, so the quotient of two times of one round is fair.

    Args:
        batches: the micro-batches of a step, the same ones for every step and variant.
        memory: charged with what each step allocates.
        on_step: called after each step with the variant's name and a ``Times`` whose last entries are the
            step's.
    """
    times = {variant.name: Times() for variant in variants}
    order = random.Random(seed)
    for round_index in range(warmup + steps):
        for variant in order.sample(variants, len(variants)):
            measured = times[variant.name] if round_index >= warmup else Times()
            with memory.charged(variant.name, measured=round_index >= warmup):
                timed_step(variant, batches, measured)
            on_step(variant.name, measured)
    return times


def timed_step(variant: Variant, batches: Sequence[Batch], times: Times) -> None:
    """Take one step and append the times of its parts to ``times``; no part waits for the device."""
    watch = Stopwatch("clear", "forward-backward", "communication", "agreement", "update")
    device.synchronize()
    with ranges.watched_by(watch.watch):
        variant.step(batches)
    seconds = watch.seconds()
    times.forward_backward.append(seconds["forward-backward"] - seconds["communication"])
    times.communication.append(seconds["communication"])
    times.optimizer.append(seconds["clear"] + seconds["agreement"] + seconds["update"])
