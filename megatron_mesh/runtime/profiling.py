"""Name ranges of code within a step, for profilers and timers. Without a watcher they cost nothing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from megatron_mesh.runtime import device

Watcher = Callable[[str], AbstractContextManager[None]]

_NOTHING = nullcontext()
_watchers: list[Watcher] = []


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Enter ``watcher(name)`` around every range inside. Adding a watcher twice has no effect."""
    if watcher in _watchers:
        yield
        return
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def marking() -> AbstractContextManager[None]:
    """Show the ranges inside in torch's profiler, and as NVTX ranges in Nsight Systems."""
    return watched_by(device.marked)


def named(name: str) -> AbstractContextManager[None]:
    """Name the code inside."""
    return _watched(name) if _watchers else _NOTHING


@contextmanager
def _watched(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        for watcher in _watchers:
            stack.enter_context(watcher(name))
        yield
