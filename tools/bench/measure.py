"""Measure training steps: their time, peak memory, tensors saved for backward, and traces.

A ``Variant`` (built in ``variants.py``) is what gets measured. ``report.py`` summarizes the results. Other
benchmarks use the clock, ``now``.
"""

import random
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import profile

from megatron_mesh.config.schema import Config
from megatron_mesh.data import Batch
from megatron_mesh.runtime import device, profiling


class Variant(ABC):
    """A model under test with its optimizer."""

    name: str
    config: Config
    """The resolved run. For an eager loop, the run of the scheme that it computes."""
    model: nn.Module

    @abstractmethod
    def losses(self, batch: Batch) -> Tensor:
        """Run the forward pass on one micro-batch; return its mean loss or its loss per token."""

    @abstractmethod
    def step(self, batches: Sequence[Batch]) -> None:
        """Take an optimizer step on the loss per token of all ``batches``.

        Profilers and stopwatches see the ranges "clear", "forward-backward", "communication" (inside
        forward-backward), "agreement" and "update". A range that a variant doesn't have counts as 0 s.
        """

    @property
    @abstractmethod
    def layers(self) -> Iterable[nn.Module]:
        """Every layer once."""


def now() -> float:
    """Wait for the device, then read the clock, in seconds."""
    device.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Times the named ranges of a step (``runtime/phases.py``) without waiting for the device in between.

    Args:
        names: the ranges to time; all others are ignored.
    """

    def __init__(self, *names: str):
        self._names = names
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """Time the block if ``name`` is one of the names."""
        if name not in self._names:
            yield
            return
        start = device.moment()
        yield
        self._spans.append((name, start, device.moment()))

    def seconds(self) -> dict[str, float]:
        """Wait for the device and return the total time per name, 0 for a range that never ran."""
        totals = dict.fromkeys(self._names, 0.0)
        for name, start, end in self._spans:
            totals[name] += device.seconds_between(start, end)
        return totals


class MemoryMeter:
    """Tracks the memory of each variant while all of them share one device."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()
        self._peak: Counter[str] = Counter()
        self._retries: Counter[str] = Counter()

    @contextmanager
    def charged(self, name: str, *, measured: bool = False) -> Iterator[None]:
        """Charge memory that the block allocates to the variant ``name``.

        Args:
            measured: whether this turn counts for the peak and the allocation retries.
        """
        before = device.allocated_bytes()
        if before is None:
            yield
            return
        retries = device.allocation_retries()
        device.reset_peak_memory()
        yield
        after = device.allocated_bytes()
        assert after is not None
        if measured:
            own = self._held[name] + device.peak_memory_bytes() - before
            self._peak[name] = max(self._peak[name], own)
            self._retries[name] += device.allocation_retries() - retries
        self._held[name] += after - before

    def peak(self, name: str) -> int | None:
        """Peak bytes of the variant in a measured turn; None on a CPU, where torch doesn't count them."""
        return self._peak.get(name)

    def retries(self, name: str) -> int:
        """Allocation retries in measured turns.

        On a retry the device was full and the allocator first had to free its cache. Such a step takes longer
        than it would if the variant had the device to itself.
        """
        return self._retries[name]


@dataclass
class Times:
    """Seconds of each measured step. Entry i of every variant is from the same round."""

    forward_backward: list[float] = field(default_factory=list)
    """All micro-batches of the step."""
    communication: list[float] = field(default_factory=list)
    """Reducing the gradients over ranks (here only one) and dividing them by the number of tokens."""
    optimizer: list[float] = field(default_factory=list)
    """Clearing gradients, the agreement of the ranks (gradient norm and more), clipping, AdamW, schedule."""

    @property
    def step(self) -> list[float]:
        """The whole step."""
        parts = (self.forward_backward, self.communication, self.optimizer)
        return [sum(seconds) for seconds in zip(*parts, strict=True)]


def measure_steps(
    variants: Sequence[Variant],
    batches: Sequence[Batch],
    *,
    steps: int,
    warmup: int,
    memory: MemoryMeter,
    seed: int = 0,
    on_step: Callable[[str, Times], None] = lambda name, times: None,
) -> dict[str, Times]:
    """Train every variant for ``warmup + steps`` steps, one step of each per round.

    Each round has a new random order. Other load on the machine and its temperature then affect all variants
    alike, so the ratio of two times from the same round is fair.

    Args:
        batches: the micro-batches of a step; every step of every variant uses the same ones.
        memory: charged with what each step allocates.
        on_step: called after each step with the variant's name and a ``Times`` that ends with this step.
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
    """Take one step and append its times to ``times``, without waiting for the device within the step."""
    watch = Stopwatch("clear", "forward-backward", "communication", "agreement", "update")
    device.synchronize()
    with profiling.watched_by(watch.watch):
        variant.step(batches)
    seconds = watch.seconds()
    times.forward_backward.append(seconds["forward-backward"] - seconds["communication"])
    times.communication.append(seconds["communication"])
    times.optimizer.append(seconds["clear"] + seconds["agreement"] + seconds["update"])


@dataclass(frozen=True)
class SavedTensors:
    """Tensors that autograd saves for the backward pass of one micro-batch, except the parameters."""

    states: int
    """Number of tensors with the hidden state's shape, [S, B, H]."""
    state_bytes: int
    """Bytes of those."""
    total_bytes: int
    """Bytes of all saved tensors: states, attention, MLP, logits and router weights."""


def saved_for_backward(variant: Variant, batch: Batch) -> SavedTensors:
    """Count what a forward pass on ``batch`` saves. A tensor that is saved twice counts once."""
    parameters = {p.untyped_storage().data_ptr() for p in variant.model.parameters()}
    shape = (batch.tokens.shape[1], batch.tokens.shape[0], variant.config.model.hidden_size)
    saved: dict[int, Tensor] = {}  # by memory address
    states: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        address = x.untyped_storage().data_ptr()
        if address not in parameters:
            saved[address] = x  # the reference keeps the address from being reused while we count
            if x.shape == shape:
                states[address] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = variant.losses(batch)
    assert losses.requires_grad
    return SavedTensors(states=len(states), state_bytes=_bytes(states), total_bytes=_bytes(saved))


def _bytes(tensors: dict[int, Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors.values())


def write_traces(variants: Sequence[Variant], batches: Sequence[Batch], directory: Path) -> list[Path]:
    """Write one step of each variant to ``directory/VARIANT.json``, with its passes and cycles named.

    The files are Chrome traces, for ui.perfetto.dev or chrome://tracing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for variant in variants:
        with profile() as profiler, profiling.marking():
            variant.step(batches)
        path = directory / f"{variant.name}.json"
        profiler.export_chrome_trace(str(path))
        written.append(path)
    return written
