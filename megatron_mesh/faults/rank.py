"""A small disk to fill up: a tmpfs in a mount namespace that only the ranks under test join.

Runs inside a watched rank: reports every phase that the rank enters, and holds it in the targeted one.

The trainer itself only calls ``phases.enter``. The listener below blocks the thread that enters a phase.
"""

import contextlib
import ctypes
import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_mesh.errors import UserError
from megatron_mesh.runtime import phases
from megatron_mesh.runtime.run_files import CHECKPOINTS

_CLONE_NEWUSER, _CLONE_NEWNS = 0x10000000, 0x00020000
_FILLER = "filler"


class DiskUnavailable(UserError):
    """No file system can be mounted here; the message says why."""


class SmallDisk:
    """A tmpfs of ``megabytes`` at ``path``, in a mount namespace that a waiting shell keeps alive.

    Works without root.

    Raises:
        DiskUnavailable: the system does not allow such a mount.
    """

    def __init__(self, path: Path, megabytes: int):
        if shutil.which("unshare") is None:
            raise DiskUnavailable("the command unshare (of util-linux) is not installed")
        path.mkdir(parents=True, exist_ok=True)
        mount = 'mount -t tmpfs -o "size=$1m" tmpfs "$2" && echo mounted && read -r line'
        self._holder = subprocess.Popen(
            [
                "unshare",
                "--user",
                "--map-root-user",
                "--mount",
                "sh",
                "-c",
                mount,
                "sh",
                str(megabytes),
                str(path),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if self._holder.stdout.readline() != "mounted\n":
            reason = self._holder.stderr.read().strip()
            self.close()
            raise DiskUnavailable(f"no tmpfs can be mounted in a private namespace ({reason})")
        self.namespace = self._holder.pid
        # The path outside of the namespace.
        self.path = Path(f"/proc/{self.namespace}/root{path.resolve()}")

    def fill(self) -> None:
        """Fill the disk to the last block."""
        with (self.path / _FILLER).open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)

    def empty(self) -> None:
        """Free the space that ``fill`` took."""
        (self.path / _FILLER).unlink(missing_ok=True)

    def close(self) -> None:
        """Release the disk; it disappears with the last rank that uses it."""
        with contextlib.suppress(BrokenPipeError):
            self._holder.communicate()


def join_namespace(process: int) -> None:
    """Move this single-threaded process into the mount namespace of ``process``."""
    libc = ctypes.CDLL(None, use_errno=True)
    handles = [os.open(f"/proc/{process}/ns/{kind}", os.O_RDONLY) for kind in ("user", "mnt")]
    for handle, kind in zip(handles, (_CLONE_NEWUSER, _CLONE_NEWNS), strict=True):
        if libc.setns(handle, kind):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        os.close(handle)


ENTRY = Path(__file__).resolve().parents[2] / "pretrain_mesh.py"
HOLD_SECONDS = 120.0
"""A rank that is held longer than this exits: the fault test must have died."""
_GAVE_UP = 98
BEGINS = "begins"
"""A rank's first report, before it imports anything large."""
_MIDDLE = 3
"""The writer holds at this box of its file, to be in the middle of writing."""


@dataclass(frozen=True)
class Aim:
    """Where a rank holds.

    Args:
        phase: the event of the phase; "" if only the writer holds.
        occurrence: which occurrence of it, counted from now or, with ``writing``, from when the writer holds.
        writing: during which save, counted from now, to hold the writer in the middle of its file, or 0.
    """

    phase: str
    occurrence: int = 1
    writing: int = 0


@dataclass(frozen=True)
class PhaseReport:
    """A rank has entered ``phase``."""

    phase: str
    held: bool = False
    """Whether the rank holds there, and everything that the aim names is held."""
    unfinished: tuple[str, ...] = ()
    """Unfinished checkpoints that rank 0 sees in ``--save`` when it enters its first step."""


class PhaseReporter:
    """The listener. Sends reports over ``connection``; gets an ``Aim`` (hold there) or None (continue)."""

    def __init__(self, connection: Connection, save: Path):
        self._connection, self._save = connection, save
        self._lock = threading.Lock()
        self._stepped = False
        self._releases = 0
        self._aim_at(None)

    def _aim_at(self, aim: Aim | None) -> None:
        self._aim = aim
        self._counts: Counter[str] = Counter()
        self._boxes = 0
        """Boxes written so far to the file at which the writer holds."""
        self._armed = self._writer_held = False

    def __call__(self, phase: str) -> None:
        with self._lock:
            self._take_orders()
            aim, releases = self._aim, self._releases
            # Wait for a slow writer here, because in the next save it and this thread would deadlock.
            awaits_writer = self._armed and aim is not None and aim.phase and not phase.startswith("writing")
        if awaits_writer:
            self._wait_until(lambda: self._writer_held or self._releases > releases)
        with self._lock:
            self._counts[phase] += 1
            self._send(PhaseReport(phase, unfinished=self._unfinished(phase)))
            holds, complete = self._is_aimed(phase)
            if complete:
                self._send(PhaseReport(phase, held=True))
        if holds:
            self._wait_until(lambda: self._releases > releases)

    def _is_aimed(self, phase: str) -> tuple[bool, bool]:
        """Whether this thread holds here, and whether everything that the aim names is then held."""
        aim = self._aim
        if aim is None:
            return False, False
        if aim.writing and not self._writer_held:
            self._armed = self._armed or (phase == "planning a save" and self._counts[phase] == aim.writing)
            self._boxes += self._armed and phase == "writing a box"
            if self._boxes < _MIDDLE:
                return False, False
            self._writer_held = True
            self._counts.clear()
            return True, not aim.phase
        here = phase == aim.phase and self._counts[phase] == aim.occurrence
        return here, here

    def _wait_until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + HOLD_SECONDS
        while not done():
            time.sleep(0.005)
            with self._lock:
                self._take_orders()
            if time.monotonic() > deadline:
                os._exit(_GAVE_UP)

    def _take_orders(self) -> None:
        try:
            while self._connection.poll():
                aim = self._connection.recv()
                self._releases += aim is None
                self._aim_at(aim)
        except (EOFError, OSError):  # the fault test has ended
            os._exit(_GAVE_UP)

    def _send(self, report: PhaseReport) -> None:
        try:
            self._connection.send(report)
        except OSError:
            os._exit(_GAVE_UP)

    def _unfinished(self, phase: str) -> tuple[str, ...]:
        if phase != "step" or self._stepped or os.environ["RANK"] != "0":
            return ()
        self._stepped = True
        # Checkpoints that are being deleted in the background may exist until the end of the run.
        return tuple(
            path.name for path in self._save.glob(CHECKPOINTS) if path.suffix not in ("", ".deleting")
        )


def run_rank(
    connection: Connection,
    environment: dict[str, str],
    arguments: list[str],
    log: Path,
    save: Path,
    namespace: int | None,
) -> None:
    """Run a rank: in a separate process group, with output to ``log``, start the program as a user would.

    Args:
        namespace: a process whose mount namespace the rank joins, or None.
    """
    os.setsid()
    os.environ.update(environment)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if namespace is not None:
        join_namespace(namespace)
    if "torch" in sys.modules:  # a fork of a process that has already imported everything
        sys.modules["torch"].set_num_threads(1)
    watched = PhaseReporter(connection, save)
    watched(BEGINS)
    phases.listen(watched)
    sys.argv = [ENTRY.name, *arguments]
    runpy.run_path(str(ENTRY), run_name="__main__")
