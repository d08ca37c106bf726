"""Announce the phases of a run by name, for the breakdown of the start and for the fault test.

Name ranges of code within a step, for profilers and timers. Without a watcher they cost nothing.

Log how long each phase of a run's start takes, in one line after the first step.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from megatron_mesh.runtime import device
from megatron_mesh.runtime.environment import process_age

_listeners: list[Callable[[str], None]] = []


def enter(phase: str) -> None:
    """Announce that this process enters ``phase``, for example "data" or "planning a save"."""
    for listener in _listeners:
        listener(phase)


def listen(listener: Callable[[str], None]) -> None:
    """Call ``listener`` with the name of every later phase, in the thread that enters it."""
    _listeners.append(listener)


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


class StartTimes:
    """Sums up the seconds of each phase until the first step is done, then logs them once.

    A phase lasts until the next one in ``_LABELS`` begins. Other phases count as part of the current one. The
    first phase includes the start of the interpreter.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(_LABELS, 0.0)
        self._phase, self._since = "imports", 0.0
        self._done = False

    def __call__(self, phase: str) -> None:
        """Account for the process entering ``phase``; called by ``phases.enter``."""
        if self._done or phase not in (*_LABELS, STARTED):
            return
        now = process_age()
        self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now
        if phase == STARTED:
            self._done = True
            parts = ", ".join(f"{label} {self.seconds[name]:.1f} s" for name, label in _LABELS.items())
            logger.info("first step done %.1f s after the start of the process: %s", now, parts)


def log_start_times() -> None:
    """Log the breakdown once the first step is done. Call this before everything else."""
    listen(StartTimes())
