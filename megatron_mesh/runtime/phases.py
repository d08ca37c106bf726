"""Name what a run is doing: the phases of the whole run, and ranges of code within a step.

Listeners hear of each phase when it begins (``enter``): ``StartTimes`` logs how long each phase of the start
took, and the fault test strikes in a chosen one. Watchers, such as profilers and timers, surround each range
(``named``). Without a watcher a range costs nothing.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from megatron_mesh.runtime.environment import process_age

logger = logging.getLogger(__name__)

STARTED = "after the first step"
"""The phase that begins when the first step is done."""
_LABELS = {
    "imports": "imports",
    "groups": "groups",
    "data": "data",
    "model": "model",
    "loading a checkpoint": "checkpoint",
    "step": "first step",
}

Watcher = Callable[[str], AbstractContextManager[None]]

_listeners: list[Callable[[str], None]] = []
_watchers: list[Watcher] = []
_NOTHING = nullcontext()


def enter(phase: str) -> None:
    """Announce that this process enters ``phase``, for example "data" or "planning a save"."""
    for listener in _listeners:
        listener(phase)


def listen(listener: Callable[[str], None]) -> None:
    """Call ``listener`` with the name of every later phase, in the thread that enters it."""
    _listeners.append(listener)


def log_start_times() -> None:
    """Log how long each phase of the start took, after the first step. Call this before everything else."""
    listen(StartTimes())


class StartTimes:
    """Adds up the seconds of each phase until the first step is done, then logs them once.

    A phase lasts until the next one in ``_LABELS`` begins. Other phases count as part of the current one. The
    first phase includes the start of the interpreter.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(_LABELS, 0.0)
        self._phase, self._since = "imports", 0.0
        self._done = False

    def __call__(self, phase: str) -> None:
        """Record that the process enters ``phase``. ``enter`` calls this."""
        if self._done or phase not in (*_LABELS, STARTED):
            return
        now = process_age()
        self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now
        if phase == STARTED:
            self._done = True
            parts = ", ".join(f"{label} {self.seconds[name]:.1f} s" for name, label in _LABELS.items())
            logger.info("first step done %.1f s after the start of the process: %s", now, parts)


def named(name: str) -> AbstractContextManager[None]:
    """Name the range of code inside."""
    return _watched(name) if _watchers else _NOTHING


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
    from megatron_mesh.runtime import device

    return watched_by(device.marked)


@contextmanager
def _watched(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        for watcher in _watchers:
            stack.enter_context(watcher(name))
        yield
