"""Clocks of the benchmarks: one that waits for the device, and one that does not."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_mesh.runtime import device


def now() -> float:
    """Seconds; waits for the device first."""
    device.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Times the named stretches of a step (``runtime/ranges.py``) without waiting for the device in between.

    Args:
        names: the stretches to time; the others are ignored.
    """

    def __init__(self, *names: str):
        self._names = names
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """Time what runs inside, if ``name`` is one of the names."""
        if name not in self._names:
            yield
            return
        start = device.moment()
        yield
        self._spans.append((name, start, device.moment()))

    def seconds(self) -> dict[str, float]:
        """Total time of every name, 0 if it never ran; waits for the device."""
        totals = dict.fromkeys(self._names, 0.0)
        for name, start, end in self._spans:
            totals[name] += device.seconds_between(start, end)
        return totals
