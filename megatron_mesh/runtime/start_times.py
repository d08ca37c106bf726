"""Log where the time to the first step goes, in one line, from the phases of the start."""

import logging

from megatron_mesh.runtime import phases
from megatron_mesh.runtime.environment import process_age

logger = logging.getLogger(__name__)

STARTED = "after the first step"
"""Entered once, when the first step is done."""
_LABELS = {
    "imports": "imports",
    "groups": "groups",
    "data": "data",
    "model": "model",
    "loading a checkpoint": "checkpoint",
    "step": "first step",
}


class StartTimes:
    """Adds up the seconds of each phase until the first step is done, then logs them once.

    A phase lasts until the next one that this class knows. Other phases count towards the one around them.
    The first phase includes the start of the interpreter.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(_LABELS, 0.0)
        self._phase, self._since = "imports", 0.0
        self._done = False

    def __call__(self, phase: str) -> None:
        """The process enters ``phase``; see ``phases.listen``."""
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
    """Log the breakdown of this process's start when its first step is done. Call it first of all."""
    phases.listen(StartTimes())
