"""Let all ranks meet before torch.distributed starts, so that none waits for a rank that has failed.

Every rank takes part, even one with an error. If all arrive without an error, the job starts. Otherwise all
ranks end at once, with the exit status of the first that failed. If some don't arrive in time, one rank lists
them.

Open the store at which a job's ranks meet.

Rank 0 opens the store at any free port, and a signpost at the first free port in a list that all ranks know
(``find_rendezvous``). To everyone who connects, the signpost sends the name of the job and the port of its
store. A rank that finds another job's signpost, or something else, tries the next port in the list.
"""

import errno
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_mesh.errors import RanksLost, UserError
from megatron_mesh.runtime import exits, strict_json
from megatron_mesh.runtime.environment import agent_holds_store, store_holder, world_size_from_environment
from megatron_mesh.runtime.failures import Failures

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


ANSWER_SECONDS = 5.0
"""How long a signpost may take to answer, since rank 0 may be importing."""
PATIENCE_SECONDS = 15.0
"""How long rank 0 retries a given port, at which another job may just be starting."""
FOREIGN_SECONDS = 30.0
"""How long the other ranks accept that something else answers at a given port before they give up."""
_BACKLOG = 4096
_PORTS_TO_TRY = 8


class PortTaken(UserError):
    """Rank 0 cannot listen at the given port, where every rank finds something else."""


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of a job find each other."""

    address: str
    """Host of the process that holds the store: rank 0 or torchrun's agent."""
    ports: tuple[int, ...]
    """Rank 0 listens at the first free one."""
    given: bool
    """Whether the user or torchrun has given the port, so that no other may be used."""
    spare: tuple[int, ...]
    """Ports at which rank 0 informs the others that it cannot listen at the given port."""
    job: str
    """Identifies this start of the job: the same for all its ranks, different for other jobs and starts."""


def find_rendezvous() -> Rendezvous:
    """Find out where this job's ranks meet: from torchrun or the user, or else from SLURM's job step.

    Without MASTER_PORT the ports are derived from job, step, restart and user. So jobs on the same host
    rarely try the same port, and no start meets a leftover of an earlier one.

    Raises:
        UserError: MASTER_ADDR is not set and this is not a SLURM job step; or MASTER_PORT is not a port.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID")
    parts = [os.environ.get(name, "") for name in names]
    job = "/".join([*parts, str(os.getuid()), str(world_size_from_environment())])
    address, port = os.environ.get("MASTER_ADDR") or _first_host(), os.environ.get("MASTER_PORT")
    ports = _ports_of(job)
    if not port:
        return Rendezvous(address, ports, False, (), job)
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT={port} is not a port; give a number from 1 to 65535, or leave it unset")
    return Rendezvous(address, (int(port),), True, ports, job)


def _ports_of(job: str) -> tuple[int, ...]:
    """Ports below 32768, above which systems choose ports of outgoing connections."""
    digest = hashlib.sha256(job.encode()).digest()
    numbers = (int.from_bytes(digest[index : index + 4]) for index in range(0, 4 * _PORTS_TO_TRY, 4))
    return tuple(20000 + number % 12000 for number in numbers)


def _first_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    try:
        if nodes is None:
            raise OSError("this is not a SLURM job step")
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"the ranks cannot find each other: MASTER_ADDR is not set ({error}); start with torchrun, or "
            "export MASTER_ADDR=<name of the first node>"
        ) from None


class Signpost:
    """Answers each connection to a port with one line of JSON, from a separate thread."""

    def __init__(self, port: int) -> None:
        """Listen at the port. Raises OSError if it is taken."""
        try:
            self._listener = socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
            )
        except (OSError, ValueError) as error:
            if isinstance(error, PermissionError) or getattr(error, "errno", 0) == errno.EADDRINUSE:
                raise
            self._listener = socket.create_server(("", port), backlog=_BACKLOG)  # a host without IPv6
        self._closed = threading.Event()

    def show(self, **directions: Any) -> None:
        """Start to answer with these directions."""
        line = strict_json.dumps(directions).encode() + b"\n"
        threading.Thread(target=self._answer, args=(line,), daemon=True, name="signpost").start()

    def _answer(self, line: bytes) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed, or no file descriptor is left at the moment
                if self._closed.wait(0.1):
                    return
                continue
            with connection, suppress(OSError):
                connection.sendall(line)

    def close(self) -> None:
        """Stop listening and release the port."""
        self._closed.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which waits in accept
        self._listener.close()


def open_store(
    place: Rendezvous, rank: int, world_size: int, timeout: timedelta, *, failing: bool = False
) -> tuple[dist.Store, Signpost | None]:
    """Open the job's store. On the rank that holds it, also return the signpost, needed until all have
    arrived.

    Args:
        failing: this rank joins only to report an error to the others.

    Raises:
        PortTaken: no port is free, or something else uses the given one.
        RanksLost: rank 0 does not announce the store within ``timeout``.
    """
    if agent_holds_store():
        return _connect(place.address, place.ports[0], world_size, timeout), None
    if rank:
        return _connect(place.address, _look_for_store(place, timeout), world_size, timeout), None
    signpost = _put_up_signpost(place, failing)
    store = dist.TCPStore("localhost", 0, world_size, True, timeout, wait_for_workers=False)
    signpost.show(job=place.job, port=store.port)
    return store, signpost


def _put_up_signpost(place: Rendezvous, failing: bool) -> Signpost:
    end = time.monotonic() + (PATIENCE_SECONDS if place.given and not failing else 0)
    while True:
        for port in place.ports + (place.spare if failing else ()):
            try:
                return Signpost(port)
            except OSError as error:
                reason = error.strerror
        if time.monotonic() >= end:
            break
        time.sleep(0.5)
    if place.given:
        raise PortTaken(
            f"rank 0 cannot listen at port {place.ports[0]} (MASTER_PORT): {reason}; choose another port, or "
            "leave MASTER_PORT unset"
        )
    tried = ", ".join(map(str, place.ports))
    raise PortTaken(f"rank 0 finds no free port ({tried}: {reason}); set MASTER_PORT to one that is free")


def _look_for_store(place: Rendezvous, timeout: timedelta) -> int:
    """Get the port of the job's store from its signpost."""
    begin, pause, reason, foreign_since = time.monotonic(), 0.1, "", None
    while time.monotonic() - begin < timeout.total_seconds():
        for port in place.ports + place.spare:
            try:
                answer = _ask(place.address, port)
            except OSError as error:
                if port in place.ports:
                    reason = error.strerror or str(error)
                continue
            if answer.get("job") == place.job:
                return int(answer["port"])
            if port in place.ports:
                reason = f"something else answers at port {port}"
                foreign_since = foreign_since or time.monotonic()
        if place.given and foreign_since and time.monotonic() - foreign_since > FOREIGN_SECONDS:
            raise PortTaken(
                f"{reason} on {place.address} (MASTER_PORT, MASTER_ADDR), not rank 0 of this job; choose "
                "another port, or leave MASTER_PORT unset"
            )
        time.sleep(pause)
        pause = min(2 * pause, 2.0)
    ports = ", ".join(map(str, place.ports))
    raise RanksLost(
        f"rank 0 does not answer at {place.address}:{ports} (MASTER_ADDR, MASTER_PORT) after "
        f"{timeout.total_seconds():.0f} s ({reason}); check that it runs, and that this host can reach it"
    )


def _ask(address: str, port: int) -> dict[str, Any]:
    """Ask for a signpost's directions; empty if something else answers.

    Raises:
        OSError: nothing answers there.
    """
    with socket.create_connection((address, port), timeout=ANSWER_SECONDS) as connection:
        try:
            with connection.makefile("rb") as answer:
                directions = strict_json.loads(answer.readline(4096))
        except (OSError, ValueError):
            return {}
    return directions if isinstance(directions, dict) else {}


def _connect(address: str, port: int, world_size: int, timeout: timedelta) -> dist.Store:
    try:
        return dist.TCPStore(address, port, world_size, False, timeout, wait_for_workers=False)
    except dist.DistNetworkError:
        raise RanksLost(
            f"{store_holder()} does not answer at port {port} after {timeout.total_seconds():.0f} s; check "
            "that it runs, and that this host can reach it"
        ) from None
