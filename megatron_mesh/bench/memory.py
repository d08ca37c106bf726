"""Peak memory of each variant, though all of them live on one device."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_mesh.runtime import device


class MemoryMeter:
    """What a variant holds between its turns, and the most that it held in one."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()
        self._peak: Counter[str] = Counter()
        self._retries: Counter[str] = Counter()

    @contextmanager
    def charged(self, name: str, *, measured: bool = False) -> Iterator[None]:
        """What is allocated inside, and stays, is the variant's.

        Args:
            measured: whether the most that is allocated inside is a peak that counts.
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
        """Most bytes that the variant held in a measured turn; None on a CPU, where nobody counts."""
        return self._peak.get(name)

    def retries(self, name: str) -> int:
        """How often in measured turns the allocator found the device full, and gave back what it had kept for
        later: such a step takes longer than it would alone on the device."""
        return self._retries[name]
