"""Inside a rank that is watched: it reports every phase, and holds in the one that is aimed at.

Nothing of this is in the product but ``phases.enter``: the listener below blocks the thread that enters a phase.
"""

import os
import runpy
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_mesh.faults.disk import join_namespace
from megatron_mesh.runtime import phases

ENTRY = Path(__file__).resolve().parents[2] / "pretrain_mesh.py"
HOLD_SECONDS = 120.0
"""A rank that is held longer gives up: the tool is gone."""
_GAVE_UP = 98
BEGINS = "begins"
"""The first report of a rank, before it imports anything of weight."""
_MIDDLE = 3
"""The box of a file at which the writer holds when it is to be in the middle."""


@dataclass(frozen=True)
class Aim:
    """Where a rank is to hold.

    Args:
        phase: as the product enters it; "" if the writer alone is to hold.
        occurrence: the how-manieth time from now on, or from when the writer is held.
        writing: the how-manieth save from now on, in the middle of whose file the writer holds first; 0: none.
    """

    phase: str
    occurrence: int = 1
    writing: int = 0


@dataclass(frozen=True)
class Report:
    """A rank has entered ``phase``."""

    phase: str
    held: bool = False
    """Whether it holds there, with all that was to be held before."""
    unfinished: tuple[str, ...] = ()
    """Directories on their way in or out of ``--save``, seen by rank 0 when it enters its first step."""


class Watched:
    """The listener. ``connection`` carries reports out; ``Aim`` (hold) and None (go on) in."""

    def __init__(self, connection: Connection, save: Path):
        self._connection, self._save = connection, save
        self._lock = threading.Lock()
        self._go = threading.Event()
        self._aim: Aim | None = None
        self._counts: Counter[str] = Counter()
        self._writer_held = False
        self._boxes = 0
        """Entered by the writer of the file that is aimed at."""
        self._stepped = False

    def __call__(self, phase: str) -> None:
        with self._lock:
            self._take_orders()
            self._counts[phase] += 1
            self._send(Report(phase, unfinished=self._unfinished(phase)))
            holds, complete = self._is_aimed(phase)
            if complete:
                self._send(Report(phase, held=True))
        if holds:
            self._hold()

    def _is_aimed(self, phase: str) -> tuple[bool, bool]:
        """Whether this thread holds here, and whether with it all that was aimed at is held."""
        aim, counts = self._aim, self._counts
        if aim is None:
            return False, False
        if aim.writing and not self._writer_held:
            self._boxes += phase == "writing a box" and counts["writing in the background"] == aim.writing
            if self._boxes < _MIDDLE:
                return False, False
            self._writer_held = True
            counts.clear()
            return True, not aim.phase
        here = phase == aim.phase and counts[phase] == aim.occurrence
        return here, here

    def _hold(self) -> None:
        deadline = time.monotonic() + HOLD_SECONDS
        while not self._go.wait(0.01):
            with self._lock:
                self._take_orders()
            if time.monotonic() > deadline:
                os._exit(_GAVE_UP)

    def _take_orders(self) -> None:
        try:
            while self._connection.poll():
                self._aim = self._connection.recv()
                self._counts.clear()
                self._writer_held, self._boxes = False, 0
                if self._aim is None:
                    self._go.set()
                else:
                    self._go.clear()
        except (EOFError, OSError):  # the tool has ended
            os._exit(_GAVE_UP)

    def _send(self, report: Report) -> None:
        try:
            self._connection.send(report)
        except OSError:
            os._exit(_GAVE_UP)

    def _unfinished(self, phase: str) -> tuple[str, ...]:
        if phase != "step" or self._stepped or os.environ["RANK"] != "0":
            return ()
        self._stepped = True
        return tuple(path.name for path in self._save.glob("iter_*") if path.suffix)


def run_rank(
    connection: Connection,
    environment: dict[str, str],
    arguments: list[str],
    log: Path,
    save: Path,
    namespace: int | None,
) -> None:
    """The life of a rank: a process group of its own, output to ``log``, then the program as a user starts it.

    Args:
        namespace: a process whose mounts this one is to see, or None.
    """
    os.setsid()
    os.environ.update(environment)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if namespace is not None:
        join_namespace(namespace)
    if "torch" in sys.modules:  # a fork of a process that has imported everything
        sys.modules["torch"].set_num_threads(1)
    watched = Watched(connection, save)
    watched(BEGINS)
    phases.listen(watched)
    sys.argv = [ENTRY.name, *arguments]
    runpy.run_path(str(ENTRY), run_name="__main__")
