"""Stop a run after a step, with a checkpoint, on a signal, a stop file, a time limit or an interval.

A signal may reach only one rank, but all ranks must stop after the same step. So the ranks agree in every
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
from megatron_mesh.runtime.run_files import STATUS_FILE, STOP_FILE, replace_text

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO_SECONDS = 5.0
"""A signal this soon after the first belongs to the same request: launchers repeat signals."""

URGENT = ("the stop file", "SIGINT", "SIGTERM", "SIGUSR1")
"""Reasons to stop that a kill may follow: no evaluation is started, and a running one is cut short."""
REASONS = ("--exit-interval", "--exit-duration-in-mins", *URGENT)
"""All reasons to stop. If ranks have different ones, the last one in this order wins."""


class StopRequests:
    """Collects the reasons to stop that this rank has.

    Args:
        settings: ``settings.save`` is the directory of the stop file.
        started: ``time.monotonic()`` at the start of the job.
    """

    def __init__(self, settings: CheckpointConfig, started: float):
        self._settings = settings
        self._started = started
        self._file = Path(settings.save) / STOP_FILE if settings.save else None
        self._signalled = ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals. A second request ends the process at once, with status 128 + the signal's
        number.

        Python runs its handlers only when the main thread returns from its current call, which may be a
        collective that never returns. So a thread also reads the numbers of the signals, from a pipe that is
        written immediately (``signal.set_wakeup_fd``).
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
        # Unlike Path.exists, os.path.exists is False after file system errors such as a stale handle.
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
            logger.warning("cannot remove %s: %s; remove it, or the next run stops too", self._file, error)


def _end_at_second_request(pipe: int) -> None:
    """End this process at the second request.

    Neither a repeated signal within ``ECHO_SECONDS`` nor another SIGTERM in a SLURM job counts as a second
    request. SLURM itself sends SIGTERM at the end of a grace time, and kills the job after KillWait anyway.
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
    """Write the state of the run to ``directory/run_status.txt``, for scripts that restart it. Rank 0 writes.

    Args:
        status: ``running``, ``stopped`` (on request, with a checkpoint), ``done`` or ``failed``.

    If the run fails, ``failures.py`` adds the cause.
    """
    if directory is None or not is_rank_zero():
        return
    path = Path(directory) / STATUS_FILE
    try:
        replace_text(path, f"{status}\n")
    except OSError as error:  # the exit status has the same information
        logger.error("cannot write the status of the run, %s, to %s: %s", status, path, error)
