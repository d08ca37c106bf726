"""Wall-clock time of training steps, the variants taking turns."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from megatron_mesh.bench.variants import Variant
from megatron_mesh.data import Batch
from megatron_mesh.runtime import device
from megatron_mesh.train.step import run_batch


@dataclass
class Times:
    """Seconds of each measured step; entry i of every variant is from the same round."""

    forward_backward: list[float] = field(default_factory=list)
    """All micro-batches of the step, and the scaling of their gradients."""
    optimizer: list[float] = field(default_factory=list)
    """Clearing the gradients, clipping, AdamW."""

    @property
    def step(self) -> list[float]:
        """Both together."""
        return [a + b for a, b in zip(self.forward_backward, self.optimizer, strict=True)]


def measure(
    variants: Sequence[Variant],
    batches: Sequence[Batch],
    *,
    steps: int,
    warmup: int,
    seed: int = 0,
    on_step: Callable[[str, Times], None] = lambda name, times: None,
) -> dict[str, Times]:
    """Train every variant for ``warmup + steps`` steps, a step of each per round.

    The order within a round is drawn anew each time. What else runs on the machine, and how warm it is,
    then meets all variants alike, and the quotient of two times of one round is fair.

    Args:
        batches: the micro-batches of a step, the same ones for every step and variant.
        on_step: called after each step with the variant's name and a ``Times`` whose last entries are the
            step's.
    """
    times = {variant.name: Times() for variant in variants}
    order = random.Random(seed)
    for round_index in range(warmup + steps):
        for variant in order.sample(variants, len(variants)):
            measured = times[variant.name] if round_index >= warmup else Times()
            train_step(variant, batches, measured)
            on_step(variant.name, measured)
    return times


def train_step(variant: Variant, batches: Sequence[Batch], times: Times) -> None:
    """One step as the training loop does it; appends its two parts to ``times``."""
    clearing = _seconds(variant.stage.zero_grad_buffer) + _seconds(variant.optimizer.zero_grad)
    work = partial(run_batch, variant.stage, iter(batches), variant.config.training)
    times.forward_backward.append(_seconds(work))
    times.optimizer.append(clearing + _seconds(variant.optimizer.step))


def _seconds(work: Callable[[], object]) -> float:
    device.synchronize()
    start = time.perf_counter()
    work()
    device.synchronize()
    return time.perf_counter() - start
