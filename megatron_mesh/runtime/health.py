"""A job of many processes that ends when one of them cannot go on, and says which and where."""

import faulthandler
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron_mesh.errors import OutOfMemory, UserError
from megatron_mesh.runtime import exits
from megatron_mesh.runtime.failures import FAILED, RUNNING, Failures, place

_LOST_RANK = " (a lost connection: look for a rank that was killed; it could not say so itself)"
STORE_SECONDS = 5.0
"""How long a rank that ends waits for the store, which may not answer."""
FOLLOW_SECONDS = 20.0
"""How long after another rank's failure this one may still find its own end."""


class Health:
    """What one rank knows of its progress, and of the failures of others.

    Args:
        rank, world_size: this process in the job.
        store: shared by all ranks; None for a single process.
        save: the run's directory, whose ``run_status.txt`` says why the run failed; None if it has none.
    """

    def __init__(self, rank: int, world_size: int, store: dist.Store | None, save: str | None = None):
        self.rank, self.world_size = rank, world_size
        self.failures = Failures(store, save)
        self._where, self._last = "the start", time.monotonic()
        self._limit: float | None = None

    def beat(self, where: str | None = None) -> None:
        """This rank goes on, with ``where`` (for example "step 17") as its next work, if that is new."""
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
        """Name of the setting that says how long this rank may go without a beat."""
        return "--watchdog-timeout-minutes" if self._limit is None else "--save-timeout-minutes"

    def overdue(self, seconds: float) -> float:
        """How long this rank has not gone on, if longer than ``seconds`` or its work's own limit; else 0."""
        waiting = time.monotonic() - self._last
        limit = seconds if self._limit is None else self._limit
        return waiting if waiting > limit else 0.0

    def __str__(self) -> str:
        return f"{place(self.rank, self.world_size)} in {self._where}"

    def end(self, cause: str, word: str, status: int, details: str = "") -> None:
        """End this process, and say why, unless another rank has said the same."""
        who = str(self)
        _, status = self.failures.first(who, status)
        self.failures.tell(who, cause, word, details)
        _exit(status)

    def follow(self, first: tuple[str, int]) -> None:
        """End this process because another rank has failed, which one of those that follow says."""
        name, status = first
        if self.failures.is_new(f"after {name}"):
            print(f"error: {self} ends, because {name} failed", file=sys.stderr, flush=True)
        _exit(status)


def _exit(status: int) -> None:
    # A launcher that sees this process end may kill the others: first let them say what is wrong with them.
    time.sleep(1)
    os._exit(status)


@contextmanager
def failures_reported(health: Health) -> Iterator[None]:
    """A rank's failure is told once per cause, where it happened, and no rank waits for the others.

    With several ranks the process ends here, since taking down the process groups would wait for ranks that
    still work. All ranks have the exit status of the first that failed.
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
        if lost and (first := health.failures.someone()) is not None:
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
    """End this process when another rank has failed, or, with its stacks, when it hangs.

    Args:
        minutes: how long ``health`` may go without a beat (0: for ever).
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
        # Apart from the watchdog: it waits for the store, whose process may be the one that hangs.
        threads.append(threading.Thread(target=_listen, args=(health, done), daemon=True, name="listener"))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()


def _watch(health: Health, seconds: float, done: threading.Event) -> None:
    while not done.wait(min(seconds / 4, 5.0)):
        if waiting := health.overdue(seconds):
            waited = f"has not gone on for {waiting:.0f} s ({health.limit})"
            print(f"error: {health} {waited}; its stacks:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
            noting = threading.Thread(
                target=health.failures.note, args=(RUNNING, f"{health} {waited}"), daemon=True
            )
            noting.start()
            noting.join(STORE_SECONDS)
            os._exit(exits.HUNG)


def _listen(health: Health, done: threading.Event) -> None:
    failed_since = None
    while not done.wait(5.0):
        first = health.failures.someone()
        failed_since = failed_since or (time.monotonic() if first else None)
        if first and failed_since and time.monotonic() - failed_since > FOLLOW_SECONDS:
            health.follow(first)
