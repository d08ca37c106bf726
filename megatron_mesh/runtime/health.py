"""End a job of many processes when one of them fails or hangs, and say which one and where."""

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

_LOST_RANK = " (a lost connection: look for a rank that was killed; it could not say so itself)"
LISTEN_SECONDS = 2.0
"""How often a rank asks the store whether another has failed."""
LINGER_SECONDS = 3 * LISTEN_SECONDS
"""How long a rank whose exit may end the store waits for others to hear of it."""
STORE_SECONDS = 5.0
"""How long the watchdog waits for the store, which may not answer."""
FOLLOW_SECONDS = 20.0
"""How long after another rank's failure this one may still find its own error."""


class Health:
    """What one rank knows of its own progress, and of the failures of others.

    Args:
        rank, world_size: this process in the job.
        failures: with a store that all ranks share; without one for a single process.

    Attributes:
        before_exit: called before this process ends because of a failure.
    """

    def __init__(self, rank: int, world_size: int, failures: Failures):
        self.rank, self.world_size, self.failures = rank, world_size, failures
        self._where, self._last = "the start", time.monotonic()
        self._limit: float | None = None
        self.before_exit: Callable[[], None] = lambda: None

    def beat(self, where: str | None = None) -> None:
        """This rank makes progress. Its next work is ``where`` (for example "step 17"), if that is new."""
        self._where, self._last = where or self._where, time.monotonic()

    @contextmanager
    def busy(self, where: str, minutes: float = math.inf) -> Iterator[None]:
        """Suspend the watchdog's limit during the preparations, or replace it by that of a save."""
        self.beat(where)
        self._limit = minutes * 60
        try:
            yield
        finally:
            self.beat(where)  # first: the watchdog may look at any moment
            self._limit = None

    @property
    def limit(self) -> str:
        """Name of the setting that limits the time between beats."""
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
        """Don't count the last ``seconds`` before ``now``, in which this process did not run at all."""
        if self.rank == 0:
            logger.warning(
                "the process stood still for %.0f s (suspended?); the watchdog ignores that", seconds
            )
        self._last = min(now, self._last + seconds)

    def __str__(self) -> str:
        return f"{describe_rank(self.rank, self.world_size)} in {self._where}"

    def end(self, cause: str, word: str, status: int, details: str = "") -> None:
        """End this process and say why, unless another rank has said the same."""
        who = str(self)
        _, status = self.failures.note_first(who, status)
        self.failures.report(who, cause, word, details)
        self._exit(status)

    def follow(self, first: tuple[str, int]) -> None:
        """End this process because another rank has failed. One of the ranks that follow says so."""
        name, status = first
        hangs = status == exits.HUNG
        if self.failures.is_first_report(f"after {name}") or hangs:
            stacks = "; its stacks:" if hangs else ""
            print(f"error: {self} ends, because {name} failed{stacks}", file=sys.stderr, flush=True)
        if hangs:
            faulthandler.dump_traceback(all_threads=True)
        self._exit(status)

    def follow_lost_store(self) -> None:
        """End this process because the store is gone, so the process that held it has failed."""
        because = f"{store_holder()} is gone; unless it has said why, see whether it was killed"
        if self.failures.drop_store():  # another thread of this process may find this at the same time
            print(f"error: {self} ends, because {because}", file=sys.stderr, flush=True)
            if self.rank == 1:  # one line is enough, and the ranks can no longer agree on who writes it
                self.failures.note(RUNNING, f"{self}: {because}")
        self._exit(exits.CRASHED)

    def hang(self, waiting: float) -> None:
        """End this process with its stacks, after ``waiting`` seconds without a beat."""
        waited = f"has made no progress for {waiting:.0f} s ({self.limit})"
        who = str(self)
        print(f"error: {who} {waited}; its stacks:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)

        def tell_others() -> None:
            self.failures.note_first(who, exits.HUNG)
            self.failures.note(RUNNING, f"{who} {waited}")
            self._linger()

        telling = threading.Thread(target=tell_others, daemon=True)
        telling.start()
        telling.join(STORE_SECONDS + LINGER_SECONDS)
        os._exit(exits.HUNG)

    def abandon(self, cause: str) -> None:
        """End this process at once: it must not write anything more. The others follow."""
        who = str(self)
        self.failures.note_first(who, exits.CRASHED)
        print(f"error: {who}: {cause}", file=sys.stderr, flush=True)
        os._exit(exits.CRASHED)

    def finish(self) -> None:
        """This rank has ended its work well. It waits a little for others that still need the store."""
        if self.rank == 0:
            self.failures.mark_success()
        self._linger()

    def _linger(self) -> None:
        """Wait until all ranks know how the job ends, if the store may end with this process.

        Rank 0 holds the store, or torchrun's agent does, which ends once one of its processes has failed.
        """
        self.failures.mark_informed()
        if self.rank == 0 or agent_holds_store():
            self.failures.wait_until_informed(self.world_size, LINGER_SECONDS)

    def _exit(self, status: int) -> None:
        self.failures.mark_informed()
        self.before_exit()
        # A launcher that sees this process end may kill the others. First let them say what is wrong.
        time.sleep(1)
        self._linger()
        os._exit(status)


@contextmanager
def report_failure(health: Health) -> Iterator[None]:
    """Report a rank's failure once per cause, where it happened, without waiting for the other ranks.

    With several ranks the process ends here: destroying the process groups would wait for ranks that still
    work. All ranks exit with the status of the first that failed.
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
        # All ranks that lose a connection at once have one cause, though each names another peer.
        health.end("lost connection" if lost else cause, RUNNING, exits.CRASHED, details)


def _is_lost_connection(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "onnection" in str(error)
    )


@contextmanager
def watched(health: Health, minutes: float) -> Iterator[None]:
    """End this process when another rank has failed, or, with its stacks, when it hangs itself.

    Args:
        minutes: how long ``health`` may go without a beat (0: forever).
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
        # Not in the watchdog's thread: this one waits for the store, whose process may be the one that hangs.
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

    Time in which the whole process was suspended (SIGSTOP, ``scontrol suspend``) doesn't count. Such a rank
    has a fresh start when it is resumed. If it alone is suspended, the others wait for it, and report that.
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
            if not done.wait(LISTEN_SECONDS):  # this rank may be about to find its own end
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
