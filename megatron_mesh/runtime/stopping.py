"""Requests to stop, between two steps, with a checkpoint: signals, a file, a time, a step.

A signal may reach one rank only, and the others must end the same step. So all ranks vote once a step.
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

import torch
import torch.distributed as dist

from megatron_mesh.config.schema import CheckpointConfig
from megatron_mesh.runtime import device
from megatron_mesh.runtime.distributed import is_rank_zero
from megatron_mesh.runtime.failures import STATUS_FILE

logger = logging.getLogger(__name__)

STOP_FILE = "stop"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO_SECONDS = 5.0
"""A signal that comes so soon after the first is the same request: launchers pass on what ranks got too."""

URGENT = ("the stop file", "SIGINT", "SIGTERM", "SIGUSR1")
"""Reasons to stop after which a kill may follow: nothing may come between the step and its checkpoint."""
# What ranks vote with; the highest wins.
_REASONS = ("", "--exit-interval", "--exit-duration-in-mins", *URGENT)


class StopRequests:
    """Reasons to stop that this rank knows of.

    Args:
        directory: where the stop file may appear (``--save``), or None.
        started: ``time.monotonic()`` at which the job began.
    """

    def __init__(self, settings: CheckpointConfig, started: float):
        self._settings = settings
        self._started = started
        self._file = Path(settings.save) / STOP_FILE if settings.save else None
        self._signalled = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals; a second request ends the process at once (status 128 + the signal's number).

        Python's handlers wait until the main thread is back from what it called, and that may be a
        collective operation that never returns. So a thread reads the signals' numbers too, from a pipe
        that is written at once (``signal.set_wakeup_fd``).
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        threading.Thread(target=_end_at_second_request, args=(reading,), daemon=True).start()
        wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        if self._file is not None and is_rank_zero():
            self._file.unlink(missing_ok=True)  # it was meant for an earlier run
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            os.close(writing)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = self._signalled or _REASONS.index(signal.Signals(number).name)

    def agreed(self, step: int, *, faulty: bool) -> tuple[str, bool]:
        """Why all ranks stop after ``step`` ("" if they do not), and whether any rank's step is ``faulty``.

        A collective operation, once a step.
        """
        vote = torch.tensor([self._vote(step), int(faulty)], device=device.device())
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        reason, any_faulty = vote.tolist()
        return _REASONS[reason], bool(any_faulty)

    def honoured(self) -> None:
        """The run has stopped: the next one need not."""
        if self._file is not None and is_rank_zero():
            self._file.unlink(missing_ok=True)

    def _vote(self, step: int) -> int:
        if self._signalled:
            return self._signalled
        if self._file is not None and is_rank_zero() and self._file.exists():
            return _REASONS.index("the stop file")
        minutes, interval = self._settings.exit_duration_in_mins, self._settings.exit_interval
        if minutes is not None and time.monotonic() - self._started > minutes * 60:
            return _REASONS.index("--exit-duration-in-mins")
        if interval is not None and step % interval == 0:
            return _REASONS.index("--exit-interval")
        return 0


def _end_at_second_request(pipe: int) -> None:
    """End this process once a second request comes in.

    No second request are echoes (``ECHO_SECONDS``), and further SIGTERMs in a SLURM job: SLURM sends them by
    itself when a grace time is over, and after KillWait it kills whoever has not ended.
    """
    first = None
    while number := os.read(pipe, 1):  # nothing is read when the other end is closed
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
    """Say in ``directory/run_status.txt``, in one word, how the run stands: for scripts that start it again.

    ``running``, ``stopped`` (on request, with a checkpoint), ``done`` or ``failed``. Rank 0 writes. When the
    run fails, ``failures.py`` adds why.
    """
    if directory is None or not is_rank_zero():
        return
    path = Path(directory) / STATUS_FILE
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(f"{status}\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:  # the exit status says it as well
        logger.error("%s cannot say that the run is %s: %s", path, status, error)
