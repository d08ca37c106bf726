"""Announce the phases of a run by name, and log how long each phase of its start takes.

The fault test listens to the phases to know where a rank is.
"""

import logging
from collections.abc import Callable

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

_listeners: list[Callable[[str], None]] = []


def enter(phase: str) -> None:
    """Announce that this process enters ``phase``, for example "data" or "planning a save"."""
    for listener in _listeners:
        listener(phase)


def listen(listener: Callable[[str], None]) -> None:
    """Call ``listener`` with the name of every later phase, in the thread that enters it."""
    _listeners.append(listener)


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
