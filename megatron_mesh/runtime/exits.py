"""Exit statuses of a run. Launchers may hide them, so ``SAVE/run_status.txt`` records the end too."""

DONE = 0
CRASHED = 1
BAD_INPUT = 2
HUNG = 3
"""The watchdog ended a rank that made no progress."""
NOT_SAVED = 4
"""The run ended, but its last checkpoint could not be written."""
DIVERGED = 5
"""Too many steps in a row had a loss or gradient norm that was not finite."""
STOPPED = 42
"""Stopped on request, with a checkpoint: the same command resumes."""
STOPPED_UNSAVED = 43
"""Stopped on request without a checkpoint, because there is no --save."""
