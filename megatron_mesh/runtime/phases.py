"""Name the phases of a run, and log how long each phase of its start takes.

Listeners hear of each phase when it begins (``enter``): ``StartTimes`` measures the start, and the fault
test strikes in a chosen phase.
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
