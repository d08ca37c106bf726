"""Exit statuses of a run. Launchers may hide them, so ``SAVE/run_status.txt`` says how it ended, too."""

DONE = 0
CRASHED = 1
BAD_INPUT = 2
HUNG = 3
"""The watchdog ended a rank that made no progress."""
NOT_SAVED = 4
"""The run ended, and its last checkpoint could not be written."""
DIVERGED = 5
"""Too many steps in a row were not finite."""
STOPPED = 42
"""Stopped on request, with a checkpoint: the same command resumes."""
STOPPED_UNSAVED = 43
"""Stopped on request, with nothing saved: there is no --save."""
