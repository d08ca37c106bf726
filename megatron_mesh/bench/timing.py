"""Wall-clock time of training steps, the variants taking turns."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_mesh.bench.clock import now
from megatron_mesh.bench.memory import MemoryMeter
from megatron_mesh.bench.variants import Variant
from megatron_mesh.data import Batch
from megatron_mesh.runtime import ranges


@dataclass
class Times:
    """Seconds of each measured step; entry i of every variant is from the same round."""

    forward_backward: list[float] = field(default_factory=list)
    """All micro-batches of the step."""
    communication: list[float] = field(default_factory=list)
    """Reduction of the gradients over ranks (here: one), and their scaling by the number of tokens."""
    optimizer: list[float] = field(default_factory=list)
    """Clearing the gradients, clipping, AdamW."""

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

    The order within a round is drawn anew each time. What else runs on the machine, and how warm it is,
    then meets all variants alike, and the quotient of two times of one round is fair.

    Args:
        batches: the micro-batches of a step, the same ones for every step and variant.
        memory: is told of every step.
        on_step: called after each step with the variant's name and a ``Times`` whose last entries are the
            step's.
    """
    times = {variant.name: Times() for variant in variants}
    order = random.Random(seed)
    for round_index in range(warmup + steps):
        for variant in order.sample(variants, len(variants)):
            measured = times[variant.name] if round_index >= warmup else Times()
            with memory.charged(variant.name, measured=round_index >= warmup):
                train_step(variant, batches, measured)
            on_step(variant.name, measured)
    return times


def train_step(variant: Variant, batches: Sequence[Batch], times: Times) -> None:
    """One step as the training loop does it; appends its parts to ``times``."""
    start = now()
    with ranges.named("clear"):
        variant.clear()
    cleared = now()
    with ranges.named("forward-backward"):
        communication = variant.forward_backward(batches)
    differentiated = now()
    with ranges.named("optimizer"):
        variant.update()
    updated = now()
    times.forward_backward.append(differentiated - cleared - communication)
    times.communication.append(communication)
    times.optimizer.append(cleared - start + updated - differentiated)
