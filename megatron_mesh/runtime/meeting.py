"""Ranks meet here before torch.distributed starts, so that none waits for one that has failed.

Every rank comes, even one with an error. If all come without an error, the job starts. Otherwise all ranks
end at once, with the exit status of the first that failed. If some don't come in time, one rank says which.
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
"""How long a rank that cannot start waits for ranks that have not come yet, so that they hear of it."""

SECONDS_TO_REACH = 30.0
"""How long a rank with an error tries to reach the others before it speaks for itself alone."""

LEAVE_SECONDS = 10.0
"""How long the rank that holds the store waits for the others to leave."""

_ARRIVED, _COMPLETE, _VERDICT, _GIVEN_UP, _LEFT = (
    f"meeting/{name}" for name in ("arrived", "complete", "verdict", "given_up", "left")
)
_START = "start"


class Meeting:
    """One rank's part in the meeting.

    Rank 0 holds the store, or torchrun's agent does.

    Raises:
        UserError: no store can be opened or found (``rendezvous.py``), or another process has this rank.
        RanksLost: rank 0 does not show where its store is within ``timeout``.
    """

    held = False
    """Whether this process has taken part in a meeting that could start the job."""

    def __init__(self, rank: int, world_size: int, timeout: timedelta, *, failing: bool = False) -> None:
        self.rank, self.world_size, self._timeout = rank, world_size, timeout
        store, self._signpost = open_store(find_rendezvous(), rank, world_size, timeout, failing=failing)
        self._holds_store = self._signpost is not None
        # A restart by torchrun meets in the same store.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"megatron_mesh/{attempt}", store)
        if self.store.add(f"meeting/came/{rank}", 1) > 1:
            raise UserError(
                f"another process is rank {rank} of this job; if there are two jobs, give each another "
                "MASTER_PORT"
            )

    def start(self) -> None:
        """Wait until all ranks are here.

        Raises:
            SystemExit: the job cannot start. Another rank has failed, or has missed some, and has said so.
            RanksLost: a rank doesn't come within the timeout, or the store is lost.
        """
        Meeting.held = True
        try:
            self._arrive()
            try:
                self.store.wait([_VERDICT], self._timeout)
            except dist.DistStoreError:
                if self.store.add(_GIVEN_UP, 1) == 1:  # the others need not ask for each rank as well
                    self._give_up()
                self.store.wait([_VERDICT], timedelta(seconds=SECONDS_TO_REACH))
            verdict = self.store.get(_VERDICT).decode()
        except dist.DistError:
            raise RanksLost(
                f"the job's store was lost before all ranks had come: {store_holder()} has ended or does not "
                "answer; see what it said"
            ) from None
        if verdict != _START:
            self.leave()
            sys.exit(int(verdict))
        if self._signpost is not None:
            self._signpost.close()

    def fail(self, failures: Failures, who: str, cause: str, word: str, status: int, details: str) -> int:
        """Tell of this rank's error (see ``Failures.tell``), and wait for the others.

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
        """Wait until nobody else is expected. The rank that holds the store goes last."""
        with suppress(dist.DistError):
            self.store.wait([_COMPLETE], timedelta(seconds=LINGER_SECONDS))
        with suppress(dist.DistError):
            left, end = self.store.add(_LEFT, 1), time.monotonic() + LEAVE_SECONDS
            while self._holds_store and left < self.store.add(_ARRIVED, 0) and time.monotonic() < end:
                time.sleep(0.1)
                left = self.store.add(_LEFT, 0)

    def _give_up(self) -> None:
        """End the meeting, and with it the job, without the ranks that are absent.

        Raises:
            RanksLost: there are some.
        """
        absent = [r for r in range(self.world_size) if not self.store.check([f"meeting/{r}"])]
        if not absent or self.store.compare_set(_VERDICT, "", str(exits.CRASHED)).decode() == _START:
            return
        self.store.set(_COMPLETE, "")
        named = ", ".join(map(str, absent[:16])) + (", ..." if len(absent) > 16 else "")
        raise RanksLost(
            f"{len(absent)} of {self.world_size} ranks did not come within "
            f"{self._timeout.total_seconds():.0f} s (--distributed-timeout-minutes): {named}; see whether "
            "they were started, and what their logs say"
        )


def meet_to_fail(rank: int, world_size: int) -> Meeting | None:
    """The meeting for a rank that has an error; None if the others cannot be reached."""
    if Meeting.held:
        return None
    try:
        return Meeting(rank, world_size, timedelta(seconds=SECONDS_TO_REACH), failing=True)
    except (UserError, RanksLost):
        return None
