"""The ranks of a run as processes that are watched, without a launcher that would tidy up."""

import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

from megatron_mesh.faults.rank import BEGINS, Aim, Report, run_rank


class Job:
    """A start of a run.

    Args:
        ranks: processes.
        flags: of ``pretrain_mesh.py``.
        save: the run's directory, as the ranks see it.
        log: gets what they print.
        aims: where ranks are to hold.
        fresh: start new interpreters that import everything, not forks of a process that has.
        namespace: see ``rank.run_rank``.
    """

    def __init__(
        self,
        ranks: int,
        flags: Sequence[str],
        save: Path,
        log: Path,
        aims: Mapping[int, Aim] | None = None,
        *,
        fresh: bool = False,
        namespace: int | None = None,
    ):
        context: ForkServerContext | SpawnContext
        context = SpawnContext() if fresh else ForkServerContext()
        if not fresh:
            context.set_forkserver_preload(["megatron_mesh.faults.preload"])
        self.log, self._log_start = log, log.stat().st_size if log.exists() else 0
        self.unfinished: list[str] = []
        """Unfinished checkpoints that were left when rank 0 began its first step."""
        self.entered: Counter[str] = Counter()
        """Phases of rank 0."""
        self.imported = False
        """Whether a rank has imported the program."""
        self._held: set[int] = set()
        self._connections: list[Connection] = []
        self.processes = []
        port = _free_port()
        for rank in range(ranks):
            here, there = context.Pipe()
            if aims and rank in aims:
                here.send(aims[rank])
            place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            environment = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                **place,
            }
            process = context.Process(
                target=run_rank, args=(there, environment, list(flags), log, save, namespace)
            )
            process.start()
            there.close()
            self._connections.append(here)
            self.processes.append(process)

    @property
    def codes(self) -> list[int | None]:
        """Exit codes by rank; None while it runs, negative after a signal."""
        return [process.exitcode for process in self.processes]

    @property
    def text(self) -> str:
        """What the ranks have printed since this start."""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def until(self, done: Callable[[], bool], seconds: float = 600.0) -> bool:
        """Watch until ``done`` (True), or until all ranks have ended or the time is over (False)."""
        deadline = time.monotonic() + seconds
        while True:
            self._read(0.02)
            if done():
                return True
            if None not in self.codes:
                self._read(0.0)
                return done()
            if time.monotonic() > deadline:
                return False

    def until_held(self, ranks: Iterable[int]) -> bool:
        """Watch until all ``ranks`` hold where they were aimed at, or one has ended."""
        wanted = set(ranks)
        self.until(lambda: wanted <= self._held or any(self.codes[rank] is not None for rank in wanted))
        return wanted <= self._held

    def until_ended(self, seconds: float = 600.0) -> bool:
        """Watch until all ranks have ended; False if the time is over before."""
        return self.until(lambda: None not in self.codes, seconds)

    def aim(self, rank: int, aim: Aim) -> None:
        """Let a rank hold elsewhere, counted from now on."""
        self._send(rank, aim)

    def go(self, ranks: Iterable[int]) -> None:
        """Let ranks go on that are held."""
        for rank in ranks:
            self._held.discard(rank)
            self._send(rank, None)

    def signal(self, ranks: Iterable[int], number: signal.Signals) -> None:
        """Send a signal to ranks; not to their loaders' processes, as a scheduler would."""
        for rank in ranks:
            process = self.processes[rank]
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, number)

    def close(self) -> None:
        """End what is left, with the processes that the ranks have started."""
        for process in self.processes:
            process.kill()
            assert process.pid is not None
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        for connection in self._connections:
            connection.close()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _send(self, rank: int, order: Aim | None) -> None:
        with suppress(OSError):  # it has ended
            self._connections[rank].send(order)

    def _read(self, seconds: float) -> None:
        running = [c for c in self._connections if not c.closed]
        for ready in wait(running, seconds):
            rank = self._connections.index(ready)  # type: ignore[arg-type]
            try:
                while self._connections[rank].poll():
                    self._note(rank, self._connections[rank].recv())
            except (EOFError, OSError):
                self._connections[rank].close()

    def _note(self, rank: int, report: Report) -> None:
        if report.held:
            self._held.add(rank)
            return
        self.imported = self.imported or report.phase != BEGINS
        self.entered[report.phase] += rank == 0
        self.unfinished += report.unfinished


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
