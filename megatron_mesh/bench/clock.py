"""The clock of a benchmark: a time is told when the device has done what it was given."""

import time

from megatron_mesh.runtime import device


def now() -> float:
    """Seconds; waits for the device first."""
    device.synchronize()
    return time.perf_counter()
