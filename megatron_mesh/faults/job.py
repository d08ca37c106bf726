"""Start the ranks of a run as watched processes, without a launcher that would clean up after a failure."""

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

from megatron_mesh.faults.rank import BEGINS, Aim, PhaseReport, run_rank


class RankGroup:
    """The ranks of one start of a run.

    Args:
        ranks: number of ranks.
        flags: flags of ``pretrain_mesh.py``.
        save: the run's directory as the ranks see it.
        log: file to which the ranks' output is appended.
        aims: where each of these ranks holds.
        fresh: start new interpreters that import everything, instead of forks of a process that already has.
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
        """Unfinished checkpoints that still existed when rank 0 began its first step."""
        self.phase_counts: Counter[str] = Counter()
        """How often rank 0 has entered each phase."""
        self.imported = False
        """Whether some rank has finished importing the program."""
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
    def exit_codes(self) -> list[int | None]:
        """Exit codes by rank: None while it runs, negative if a signal ended it."""
        return [process.exitcode for process in self.processes]

    @property
    def output(self) -> str:
        """The ranks' output since this start."""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def wait_until(self, done: Callable[[], bool], seconds: float = 600.0) -> bool:
        """Wait until ``done()`` (True), or until all ranks have ended or the time is up (False)."""
        deadline = time.monotonic() + seconds
        while True:
            self._read(0.02)
            if done():
                return True
            if None not in self.exit_codes:
                self._read(0.0)
                return done()
            if time.monotonic() > deadline:
                return False

    def wait_until_held(self, ranks: Iterable[int]) -> bool:
        """Wait until all ``ranks`` hold at their aims (True), or one of them has ended (False)."""
        wanted = set(ranks)
        self.wait_until(
            lambda: wanted <= self._held or any(self.exit_codes[rank] is not None for rank in wanted)
        )
        return wanted <= self._held

    def wait_until_ended(self, seconds: float = 600.0) -> bool:
        """Wait until all ranks have ended; False if the time is up first."""
        return self.wait_until(lambda: None not in self.exit_codes, seconds)

    def aim(self, rank: int, aim: Aim) -> None:
        """Give a rank another aim, whose occurrences count from now on."""
        self._send(rank, aim)

    def release(self, ranks: Iterable[int]) -> None:
        """Let held ranks continue."""
        for rank in ranks:
            self._held.discard(rank)
            self._send(rank, None)

    def signal(self, ranks: Iterable[int], number: signal.Signals) -> None:
        """Send a signal to ranks, but not to their data loaders, as a scheduler would."""
        for rank in ranks:
            process = self.processes[rank]
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, number)

    def close(self) -> None:
        """Kill the remaining ranks and every process that the ranks have started."""
        for process in self.processes:
            process.kill()
            assert process.pid is not None
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        for connection in self._connections:
            connection.close()

    def __enter__(self) -> "RankGroup":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _send(self, rank: int, order: Aim | None) -> None:
        with suppress(OSError):  # the rank has ended
            self._connections[rank].send(order)

    def _read(self, seconds: float) -> None:
        running = [c for c in self._connections if not c.closed]
        for ready in wait(running, seconds):
            rank = self._connections.index(ready)  # type: ignore[arg-type]
            try:
                while self._connections[rank].poll():
                    self._record(rank, self._connections[rank].recv())
            except (EOFError, OSError):
                self._connections[rank].close()

    def _record(self, rank: int, report: PhaseReport) -> None:
        if report.held:
            self._held.add(rank)
            return
        self.imported = self.imported or report.phase != BEGINS
        self.phase_counts[report.phase] += rank == 0
        self.unfinished += report.unfinished


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
