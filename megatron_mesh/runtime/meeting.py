"""Let all ranks meet before torch.distributed starts, so that none waits for a rank that has failed.

Every rank takes part, even one with an error. If all arrive without an error, the job starts. Otherwise all
ranks end at once, with the exit status of the first that failed. If some don't arrive in time, one rank lists
them.
"""

import os
import sys
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from megatron_mesh.errors import RanksLost, UserError
from megatron_mesh.runtime import exits
from megatron_mesh.runtime.environment import store_holder
from megatron_mesh.runtime.failures import Failures
from megatron_mesh.runtime.rendezvous import find_rendezvous, open_store

LINGER_SECONDS = 120.0
"""How long a rank with an error waits for ranks that have not arrived, so that they learn of it."""

SECONDS_TO_REACH = 30.0
"""How long a rank with an error tries to reach the others before it reports the error by itself."""

LEAVE_SECONDS = 10.0
"""How long the rank that holds the store waits until the others have left."""

_ARRIVED, _COMPLETE, _VERDICT, _GIVEN_UP, _LEFT = (
    f"meeting/{name}" for name in ("arrived", "complete", "verdict", "given_up", "left")
)
_START = "start"


class Meeting:
    """One rank's part in the meeting. Rank 0 or torchrun's agent holds the store.

    Raises:
        UserError: no store can be opened or found (``rendezvous.py``), or another process has this rank.
        RanksLost: rank 0 does not announce its store within ``timeout``.
    """

    held = False
    """Whether this process has already been in a meeting that could start the job."""

    def __init__(self, rank: int, world_size: int, timeout: timedelta, *, failing: bool = False) -> None:
        self.rank, self.world_size, self._timeout = rank, world_size, timeout
        store, self._signpost = open_store(find_rendezvous(), rank, world_size, timeout, failing=failing)
        self._holds_store = self._signpost is not None
        # After a restart by torchrun the ranks meet in the same store.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"megatron_mesh/{attempt}", store)
        if self.store.add(f"meeting/came/{rank}", 1) > 1:
            raise UserError(
                f"another process is rank {rank} of this job; if these are two jobs, give each its own "
                "MASTER_PORT"
            )

    def start(self) -> None:
        """Wait until all ranks are here.

        Raises:
            SystemExit: the job cannot start. Another rank has failed or found that ranks are missing, and has
                reported it.
            RanksLost: a rank doesn't arrive within the timeout, or the store is lost.
        """
        Meeting.held = True
        try:
            self._arrive()
            try:
                self.store.wait([_VERDICT], self._timeout)
            except dist.DistStoreError:
                if self.store.add(_GIVEN_UP, 1) == 1:  # one rank looks for the missing ones
                    self._give_up()
                self.store.wait([_VERDICT], timedelta(seconds=SECONDS_TO_REACH))
            verdict = self.store.get(_VERDICT).decode()
        except dist.DistError:
            raise RanksLost(
                f"the job's store was lost before all ranks had arrived: {store_holder()} has ended or does "
                "not answer; look at its output"
            ) from None
        if verdict != _START:
            self.leave()
            sys.exit(int(verdict))
        if self._signpost is not None:
            self._signpost.close()

    def fail(self, failures: Failures, who: str, cause: str, word: str, status: int, details: str) -> int:
        """Report this rank's error (``Failures.report``), and wait for the others.

        Returns the exit status of the job: that of the first rank that failed.
        """
        with suppress(dist.DistError):
            status = int(self.store.compare_set(_VERDICT, "", str(status)).decode())
        failures.report(who, cause, word, details)
        with suppress(dist.DistError):
            self._arrive()
        self.leave()
        return status

    def _arrive(self) -> None:
        self.store.set(f"meeting/{self.rank}", "")
        if self.store.add(_ARRIVED, 1) == self.world_size:
            self.store.compare_set(_VERDICT, "", _START)
            self.store.set(_COMPLETE, "")

    def leave(self) -> None:
        """Wait until no other rank is expected. The rank that holds the store leaves last."""
        with suppress(dist.DistError):
            self.store.wait([_COMPLETE], timedelta(seconds=LINGER_SECONDS))
        with suppress(dist.DistError):
            left, end = self.store.add(_LEFT, 1), time.monotonic() + LEAVE_SECONDS
            while self._holds_store and left < self.store.add(_ARRIVED, 0) and time.monotonic() < end:
                time.sleep(0.1)
                left = self.store.add(_LEFT, 0)

    def _give_up(self) -> None:
        """End the meeting and the job if ranks are missing.

        Raises:
            RanksLost: ranks are missing.
        """
        absent = [r for r in range(self.world_size) if not self.store.check([f"meeting/{r}"])]
        if not absent or self.store.compare_set(_VERDICT, "", str(exits.CRASHED)).decode() == _START:
            return
        self.store.set(_COMPLETE, "")
        named = ", ".join(map(str, absent[:16])) + (", ..." if len(absent) > 16 else "")
        raise RanksLost(
            f"{len(absent)} of {self.world_size} ranks did not arrive within "
            f"{self._timeout.total_seconds():.0f} s (--distributed-timeout-minutes): {named}; check that "
            "they were started, and look at their logs"
        )


def meet_to_fail(rank: int, world_size: int) -> Meeting | None:
    """Join the meeting with an error to report; None if the other ranks cannot be reached."""
    if Meeting.held:
        return None
    try:
        return Meeting(rank, world_size, timedelta(seconds=SECONDS_TO_REACH), failing=True)
    except (UserError, RanksLost):
        return None
