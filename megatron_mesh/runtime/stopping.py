"""Requests to stop after a step, with a checkpoint: a signal, the stop file, a time limit, an interval.

A signal may reach only one rank, but all ranks must stop after the same step. So each rank votes in every
step (``train/vote.py``).
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_mesh.config.schema import CheckpointConfig
from megatron_mesh.runtime.distributed import is_rank_zero
from megatron_mesh.runtime.failures import STATUS_FILE
from megatron_mesh.runtime.files import replace_text

logger = logging.getLogger(__name__)

STOP_FILE = "stop"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO_SECONDS = 5.0
"""A signal this soon after the first is the same request: launchers repeat signals that ranks already got."""

URGENT = ("the stop file", "SIGINT", "SIGTERM", "SIGUSR1")
"""Reasons to stop that may be followed by a kill: no evaluation is begun, and one on its way is cut short."""
REASONS = ("--exit-interval", "--exit-duration-in-mins", *URGENT)
"""All reasons to stop. If ranks have different ones, the last in this order counts."""


class StopRequests:
    """Reasons to stop that this rank knows of.

    Args:
        settings: the stop file appears in ``settings.save``.
        started: ``time.monotonic()`` when the job began.
    """

    def __init__(self, settings: CheckpointConfig, started: float):
        self._settings = settings
        self._started = started
        self._file = Path(settings.save) / STOP_FILE if settings.save else None
        self._signalled = ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals; a second request ends the process at once (status 128 + the signal's number).

        Python runs its handlers only when the main thread returns from the call it is in, which may be a
        collective that never returns. So a thread also reads the signals' numbers, from a pipe that is
        written at once (``signal.set_wakeup_fd``).
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        threading.Thread(target=_end_at_second_request, args=(reading,), daemon=True).start()
        wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        self.remove_stop_file()  # left over from an earlier run
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            os.close(writing)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = self._signalled or signal.Signals(number).name

    def reason(self, step: int) -> str:
        """Why this rank wants to stop after ``step``: one of ``REASONS``, or "" to continue."""
        if urgent := self.urgent():
            return urgent
        minutes, interval = self._settings.exit_duration_in_mins, self._settings.exit_interval
        if minutes is not None and time.monotonic() - self._started > minutes * 60:
            return "--exit-duration-in-mins"
        if interval is not None and step % interval == 0:
            return "--exit-interval"
        return ""

    def urgent(self) -> str:
        """Why this rank wants to stop as soon as possible: one of ``URGENT``, or ""."""
        if self._signalled:
            return self._signalled
        # Unlike Path.exists, os.path.exists is False for a stale handle or another error of the file system.
        if self._file is not None and is_rank_zero() and os.path.exists(self._file):
            return "the stop file"
        return ""

    def remove_stop_file(self) -> None:
        """Remove the stop file, so that the next run does not stop too."""
        if self._file is None or not is_rank_zero():
            return
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s cannot be removed: %s; while it is there, runs stop", self._file, error)


def _end_at_second_request(pipe: int) -> None:
    """End this process at the second request.

    Two things do not count as a second request: echoes (``ECHO_SECONDS``), and another SIGTERM in a SLURM
    job. SLURM sends SIGTERM itself when a grace time is over, and kills the job after KillWait anyway.
    """
    first = None
    while number := os.read(pipe, 1):  # empty once the other end is closed
        if number[0] not in SIGNALS:
            continue
        if first is None:
            first = time.monotonic()
        elif time.monotonic() - first >= ECHO_SECONDS and not (
            number[0] == signal.SIGTERM and "SLURM_JOB_ID" in os.environ
        ):
            os._exit(128 + number[0])
    os.close(pipe)


def write_status(directory: str | None, status: str) -> None:
    """Write the state of the run to ``directory/run_status.txt``, for scripts that restart it.

    Args:
        status: ``running``, ``stopped`` (on request, with a checkpoint), ``done`` or ``failed``.

    Rank 0 writes. If the run fails, ``failures.py`` adds the cause.
    """
    if directory is None or not is_rank_zero():
        return
    path = Path(directory) / STATUS_FILE
    try:
        replace_text(path, f"{status}\n")
    except OSError as error:  # the exit status says it as well
        logger.error("cannot write to %s that the run is %s: %s", path, status, error)
