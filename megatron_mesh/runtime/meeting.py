"""Ranks meet here before torch.distributed starts, so that none waits for one that has failed.

Every rank comes, even one with an error. If all come without an error, the job starts. Otherwise all ranks
end at once, with the exit status of the first that failed. If some don't come in time, one rank says which.
"""

import os
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from megatron_mesh.errors import RanksLost, UserError
from megatron_mesh.runtime import exits
from megatron_mesh.runtime.environment import agent_holds_store, find_rendezvous, store_holder
from megatron_mesh.runtime.failures import Failures

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
        UserError: rank 0 cannot listen at MASTER_PORT.
        RanksLost: no store answers at MASTER_ADDR and MASTER_PORT within ``timeout``.
    """

    held = False
    """Whether this process has taken part in a meeting that could start the job."""

    def __init__(self, rank: int, world_size: int, timeout: timedelta) -> None:
        self.rank, self.world_size, self._timeout = rank, world_size, timeout
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._holds_store = rank == 0 and not agent_holds_store()
        try:
            store = dist.TCPStore(
                address,
                port,
                world_size,
                self._holds_store,
                timeout,
                wait_for_workers=False,
                multi_tenant=True,
            )
        except dist.DistNetworkError as error:
            if self._holds_store:
                raise UserError(
                    f"rank 0 cannot listen at port {port} (MASTER_PORT): {error}; choose another port"
                ) from None
            raise RanksLost(
                f"rank 0 does not answer at {address}:{port} (MASTER_ADDR, MASTER_PORT) after "
                f"{timeout.total_seconds():.0f} s; see whether it runs, and whether this host reaches it"
            ) from None
        # A restart by torchrun meets in the same store.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"megatron_mesh/{attempt}", store)

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

    def fail(self, failures: Failures, who: str, cause: str, word: str, status: int, details: str) -> int:
        """Tell of this rank's error (see ``Failures.tell``), and wait for the others.

        Returns the exit status of the job: that of the first rank that failed.
        """
        with suppress(dist.DistError):
            status = int(self.store.compare_set(_VERDICT, "", str(status)).decode())
        failures.tell(who, cause, word, details)
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
        find_rendezvous()
        if rank and not _store_answers(SECONDS_TO_REACH):
            return None
        return Meeting(rank, world_size, timedelta(seconds=SECONDS_TO_REACH))
    except (UserError, RanksLost, ValueError):
        return None


def _store_answers(seconds: float) -> bool:
    """Whether something listens at MASTER_ADDR and MASTER_PORT within ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with socket.create_connection(
                (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=1
            ):
                return True
        except OSError:
            time.sleep(0.2)
    return False
