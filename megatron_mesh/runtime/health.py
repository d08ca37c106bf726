"""End a job of many processes when one of them fails or hangs, and report which rank it was and where."""

import faulthandler
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron_mesh.errors import OutOfMemory, UserError
from megatron_mesh.runtime import exits
from megatron_mesh.runtime.environment import agent_holds_store, store_holder
from megatron_mesh.runtime.failures import FAILED, RUNNING, Failures, describe_rank

logger = logging.getLogger(__name__)

_LOST_RANK = " (lost connection: look for a rank that was killed, for example by the out-of-memory killer)"
LISTEN_SECONDS = 2.0
"""How often a rank asks the store whether another has failed."""
LINGER_SECONDS = 3 * LISTEN_SECONDS
"""How long a rank whose exit may end the store waits for the others to learn of the failure."""
STORE_SECONDS = 5.0
"""How long the watchdog waits for an answer from the store."""
FOLLOW_SECONDS = 20.0
"""How long after another rank's failure this rank may still report an error of its own."""


class Health:
    """Tracks the progress of one rank, and ends its process when it or another rank fails.

    Args:
        rank, world_size: position of this process in the job.
        failures: has a store that all ranks share, unless this process is alone.

    Attributes:
        before_exit: called before this process ends because of a failure.
    """

    def __init__(self, rank: int, world_size: int, failures: Failures):
        self.rank, self.world_size, self.failures = rank, world_size, failures
        self._where, self._last = "the start", time.monotonic()
        self._limit: float | None = None
        self.before_exit: Callable[[], None] = lambda: None

    def beat(self, where: str | None = None) -> None:
        """Tell the watchdog that this rank makes progress.

        Args:
            where: the next work, for example "step 17" (default: as before).
        """
        self._where, self._last = where or self._where, time.monotonic()

    @contextmanager
    def busy(self, where: str, minutes: float = math.inf) -> Iterator[None]:
        """Suspend the watchdog during work of unknown duration, such as building the index.

        Args:
            where: the work, for error messages.
            minutes: a limit for this work, such as a save's (default: none).
        """
        self.beat(where)
        self._limit = minutes * 60
        try:
            yield
        finally:
            self.beat(where)  # before the limit changes: the watchdog may check at any moment
            self._limit = None

    @property
    def limit(self) -> str:
        """Name of the setting that limits the time between beats now."""
        return "--watchdog-timeout-minutes" if self._limit is None else "--save-timeout-minutes"

    def overdue(self, seconds: float, now: float) -> float:
        """Seconds since the last beat if that exceeds the limit, else 0.

        Args:
            seconds: the limit, unless ``busy`` has set another.
            now: ``time.monotonic()``.
        """
        waiting = now - self._last
        limit = seconds if self._limit is None else self._limit
        return waiting if waiting > limit else 0.0

    def ignore_suspension(self, seconds: float, now: float) -> None:
        """Don't count the last ``seconds`` before ``now``, during which this process was suspended."""
        if self.rank == 0:
            logger.warning(
                "this process was suspended for %.0f s; the watchdog does not count that time", seconds
            )
        self._last = min(now, self._last + seconds)

    def __str__(self) -> str:
        return f"{describe_rank(self.rank, self.world_size)} in {self._where}"

    def end(self, cause: str, word: str, status: int, details: str = "") -> None:
        """End this process, and report why unless another rank has reported the same cause."""
        who = str(self)
        _, status = self.failures.note_first(who, status)
        self.failures.report(who, cause, word, details)
        self._exit(status)

    def follow(self, first: tuple[str, int]) -> None:
        """End this process because another rank has failed. Only one of the followers prints a line."""
        name, status = first
        hangs = status == exits.HUNG
        if self.failures.is_first_report(f"after {name}") or hangs:
            stacks = "; its stacks:" if hangs else ""
            print(f"error: {self} ends, because {name} failed{stacks}", file=sys.stderr, flush=True)
        if hangs:
            faulthandler.dump_traceback(all_threads=True)
        self._exit(status)

    def follow_lost_store(self) -> None:
        """End this process because the store is gone: the process that held it has failed."""
        because = f"{store_holder()} is gone; if it printed no error, check whether it was killed"
        if self.failures.drop_store():  # another thread of this process may notice it at the same time
            print(f"error: {self} ends, because {because}", file=sys.stderr, flush=True)
            if self.rank == 1:  # the ranks can no longer agree on who writes the one line that is enough
                self.failures.note(RUNNING, f"{self}: {because}")
        self._exit(exits.CRASHED)

    def hang(self, waiting: float) -> None:
        """End this process after ``waiting`` seconds without a beat, and print its stacks."""
        waited = f"has made no progress for {waiting:.0f} s ({self.limit})"
        who = str(self)
        print(f"error: {who} {waited}; its stacks:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)

        def inform_others() -> None:
            self.failures.note_first(who, exits.HUNG)
            self.failures.note(RUNNING, f"{who} {waited}")
            self._linger()

        informing = threading.Thread(target=inform_others, daemon=True)
        informing.start()
        informing.join(STORE_SECONDS + LINGER_SECONDS)
        os._exit(exits.HUNG)

    def abandon(self, cause: str) -> None:
        """End this process at once, because it must not write anything more. The others follow."""
        who = str(self)
        self.failures.note_first(who, exits.CRASHED)
        print(f"error: {who}: {cause}", file=sys.stderr, flush=True)
        os._exit(exits.CRASHED)

    def finish(self) -> None:
        """Record that this rank has finished, and wait a little for others that still need the store."""
        if self.rank == 0:
            self.failures.mark_success()
        self._linger()

    def _linger(self) -> None:
        """Wait until all ranks know how the job ends, if the store may end together with this process.

        Rank 0 holds the store, or torchrun's agent, which ends as soon as one of its processes has failed.
        """
        self.failures.mark_informed()
        if self.rank == 0 or agent_holds_store():
            self.failures.wait_until_informed(self.world_size, LINGER_SECONDS)

    def _exit(self, status: int) -> None:
        self.failures.mark_informed()
        self.before_exit()
        # A launcher that sees this process end may kill the others. Give them time to report their errors.
        time.sleep(1)
        self._linger()
        os._exit(status)


@contextmanager
def report_failure(health: Health) -> Iterator[None]:
    """Report an exception once per cause, with the place where it happened, without waiting for other ranks.

    With several ranks the process ends here, because destroying the process groups would wait for ranks that
    are still working. All ranks exit with the status of the first that failed.
    """
    try:
        yield
    except Exception as error:
        cause = "".join(traceback.format_exception_only(error)).strip()
        if health.world_size == 1:
            refused = isinstance(error, UserError)
            health.failures.note(FAILED if refused else RUNNING, str(error) if refused else cause)
            raise
        if isinstance(error, UserError):
            health.end(str(error), FAILED, exits.BAD_INPUT)
        if isinstance(error, OutOfMemory):
            health.end(str(error), RUNNING, exits.CRASHED)
        lost = _is_lost_connection(error)
        if lost:
            try:
                first = health.failures.first_failure()
            except dist.DistError:
                health.follow_lost_store()
            else:
                if first is not None:
                    health.follow(first)
        details = f"failed{_LOST_RANK if lost else ''}:\n{traceback.format_exc()}"
        # Ranks that lose a connection at the same time share one cause, although each names another peer.
        health.end("lost connection" if lost else cause, RUNNING, exits.CRASHED, details)


def _is_lost_connection(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "onnection" in str(error)
    )


@contextmanager
def watched(health: Health, minutes: float) -> Iterator[None]:
    """End this process when another rank fails, or when it hangs itself; then print its stacks.

    Args:
        minutes: how long this rank may go without a beat (0: forever).
    """
    if not minutes and health.world_size == 1:
        yield
        return
    done = threading.Event()
    threads = []
    if minutes:
        arguments = (health, minutes * 60, done)
        threads.append(threading.Thread(target=_watch, args=arguments, daemon=True, name="watchdog"))
    if health.world_size > 1:
        # A separate thread, because it waits for the store, and the process that holds that may be hanging.
        threads.append(threading.Thread(target=_listen, args=(health, done), daemon=True, name="listener"))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
    if health.world_size > 1:
        health.finish()


def _watch(health: Health, seconds: float, done: threading.Event) -> None:
    """End this process when ``health`` is overdue.

    Time during which the whole process was suspended (SIGSTOP, ``scontrol suspend``) doesn't count: the limit
    starts again when the process is resumed. If only this rank is suspended, the others wait for it and
    report that they hang.
    """
    interval = min(seconds / 4, 5.0)
    last = time.monotonic()
    while not done.wait(interval):
        now = time.monotonic()
        suspended = now - last - interval
        last = now
        if suspended > interval:
            health.ignore_suspension(suspended, now)
        if waiting := health.overdue(seconds, now):
            health.hang(waiting)


def _listen(health: Health, done: threading.Event) -> None:
    """End this process when another rank has failed, or the store is gone."""
    failures = health.failures
    while not done.wait(LISTEN_SECONDS) and not failures.is_informed:
        try:
            if failures.has_succeeded():
                failures.mark_informed()
                return
            first = failures.first_failure()
        except dist.DistError:
            if not done.wait(LISTEN_SECONDS):  # this rank may be about to report its own error
                health.follow_lost_store()
            return
        if first is not None:
            failures.is_first_report(
                f"after {first[0]}"
            )  # while the store is there: the first to ask will say it
            failures.mark_informed()
            if not done.wait(FOLLOW_SECONDS):
                health.follow(first)
            return
