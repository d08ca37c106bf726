"""Where the ranks of a job meet before torch.distributed starts, so that none waits for one that has failed.

Every rank comes, those with an error too. If all come without one, the job starts. If not, all end at once,
with the exit status of the first that failed.
"""

import os
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from megatron_mesh.errors import RanksLost, UserError
from megatron_mesh.runtime.environment import find_rendezvous
from megatron_mesh.runtime.failures import Failures

LINGER_SECONDS = 120.0
"""How long a job that cannot start waits for ranks that have not come yet, to tell them."""

SECONDS_TO_REACH = 30.0
"""How long a rank with an error tries to reach the others before it speaks for itself alone."""

_EVERYONE, _VERDICT, _LEFT, _ALL_LEFT = (
    "meeting/everyone",
    "meeting/verdict",
    "meeting/left",
    "meeting/all_left",
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
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._holds_store = rank == 0 and not by_agent
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
            SystemExit: another rank has failed, and has told why.
            RanksLost: a rank doesn't come within the timeout.
        """
        Meeting.held = True
        self._arrive()
        try:
            self.store.wait([_VERDICT], self._timeout)
        except dist.DistStoreError:
            raise RanksLost(self._who_is_absent()) from None
        except dist.DistError:
            sys.exit(1)  # the store's process has ended, and has told why
        verdict = self.store.get(_VERDICT).decode()
        if verdict != _START:
            self._leave()
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
            self._leave()
        return status

    def _arrive(self) -> None:
        self.store.set(f"meeting/{self.rank}", "")
        if self.store.add("meeting/arrived", 1) == self.world_size:
            self.store.compare_set(_VERDICT, "", _START)
            self.store.set(_EVERYONE, "")

    def _leave(self) -> None:
        """Wait until everyone has come, or nobody else seems to; the store's holder goes last."""
        with suppress(dist.DistError):
            self.store.wait([_EVERYONE], timedelta(seconds=LINGER_SECONDS))
        with suppress(dist.DistError):
            if self.store.add(_LEFT, 1) == self.world_size:
                self.store.set(_ALL_LEFT, "")
            elif self._holds_store:
                self.store.wait([_ALL_LEFT], timedelta(seconds=10))

    def _who_is_absent(self) -> str:
        absent = [r for r in range(self.world_size) if not self.store.check([f"meeting/{r}"])]
        named = ", ".join(map(str, absent[:16])) + (", ..." if len(absent) > 16 else "")
        return (
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
