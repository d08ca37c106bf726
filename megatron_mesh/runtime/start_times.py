"""Log how long each phase of a run's start takes, in one line after the first step."""

import logging

from megatron_mesh.runtime import phases
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
    phases.listen(StartTimes())
