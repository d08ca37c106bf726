"""A job of many processes that ends when one of them cannot go on, and says which and where."""

import faulthandler
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

_LOST_RANK = " (a lost connection: look for a rank that was killed; it could not say so itself)"
_KEY = "megatron_mesh/first_failure"


class Health:
    """What one rank knows of its progress, and the place where all note who failed first.

    Args:
        rank, world_size: this process in the job.
        store: shared by all ranks; None for a single process.
    """

    def __init__(self, rank: int, world_size: int, store: dist.Store | None):
        self.rank, self.world_size, self._store = rank, world_size, store
        self._where, self._last = "the start", time.monotonic()
        self._watched = True

    def beat(self, where: str | None = None) -> None:
        """This rank goes on, with ``where`` (for example "step 17") as its next work, if that is new."""
        self._where, self._last = where or self._where, time.monotonic()

    @contextmanager
    def busy(self, where: str) -> Iterator[None]:
        """Work of which nobody knows how long it takes; the watchdog looks away."""
        self.beat(where)
        self._watched = False
        try:
            yield
        finally:
            self._watched = True
            self.beat(where)

    @property
    def seconds_waiting(self) -> float:
        """Time since the last ``beat``; 0 while this rank is ``busy``."""
        return time.monotonic() - self._last if self._watched else 0.0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} in {self._where}"

    def first_failure(self) -> str:
        """Note that this rank fails, unless another has noted so before; returns the first one."""
        if self._store is None:
            return str(self)
        try:
            return self._store.compare_set(_KEY, "", str(self)).decode()
        except dist.DistError:
            return "the rank that holds the job's store"


@contextmanager
def failures_reported(health: Health) -> Iterator[None]:
    """A rank's failure is told once, first where it happened, and no rank waits for the others.

    The process ends here, since taking down the process groups would wait for ranks that still work.
    """
    if health.world_size == 1:
        yield
        return
    try:
        yield
    except UserError as error:
        if health.first_failure() == str(health):
            print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(exits.BAD_INPUT)
    except OutOfMemory as error:
        if health.first_failure() == str(health):
            print(f"error: {health}: {error}", file=sys.stderr, flush=True)
        os._exit(exits.CRASHED)
    except Exception as error:
        first = health.first_failure()
        if first == str(health):
            hint = _LOST_RANK if isinstance(error, RuntimeError) and "onnection" in str(error) else ""
            print(f"error: {health} failed{hint}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        else:
            print(f"error: {health} ends, because {first} failed", file=sys.stderr, flush=True)
        os._exit(exits.CRASHED)


@contextmanager
def watched(health: Health, minutes: float) -> Iterator[None]:
    """End this process, with its stacks, when ``health`` has not beaten for ``minutes`` (0: never)."""
    if not minutes:
        yield
        return
    done = threading.Event()
    seconds = minutes * 60
    thread = threading.Thread(target=_watch, args=(health, seconds, done), daemon=True, name="watchdog")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(health: Health, seconds: float, done: threading.Event) -> None:
    while not done.wait(min(seconds / 4, 5.0)):
        if health.seconds_waiting > seconds:
            print(
                f"error: {health} has not gone on for {health.seconds_waiting:.0f} s "
                "(--watchdog-timeout-minutes); its stacks:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(all_threads=True)
            os._exit(exits.HUNG)
