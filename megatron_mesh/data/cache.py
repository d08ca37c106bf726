"""The index cache: arrays that are built once, published atomically, and memory-mapped by every process.

An entry is a directory of .npy files and a manifest. It is written under a temporary name and then renamed,
so no process ever sees a part of it. If several processes build the same entry, the first to publish wins,
and an entry that is in use is never replaced.

Run a function in a separate process, so that the threads of this one keep running.

C++ code that holds Python's global interpreter lock (GIL) for minutes stops every other thread: the one that
raises the owner's counter in ``--save`` (``ownership.py``), the watchdog, the listener, and signal handlers.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
import traceback
import zlib
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_mesh.runtime import strict_json

_MANIFEST = "manifest.json"
_EDGE_BYTES = 1 << 16
_PARTIAL = ".partial-"
_ABANDONED_SECONDS = 86_400
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)

Arrays = dict[str, np.ndarray]
Make = Callable[[], Arrays]


class Key(NamedTuple):
    """Identifies an entry: ``kind`` is for people, ``description`` has everything its content depends on."""

    directory: Path
    kind: str
    description: str

    @property
    def path(self) -> Path:
        """The directory of the entry."""
        return self.directory / f"{self.kind}-{hashlib.sha256(self.description.encode()).hexdigest()[:32]}"


def load(key: Key) -> Arrays | None:
    """Memory-map an entry, opening the manifest and each array once.

    Returns None if the entry is missing, truncated, partly overwritten or a copy of another entry. The check
    reads the manifest and both ends of each array.
    """
    try:
        manifest = json.loads((key.path / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["description"] != key.description:
            return None
        arrays = {name: _map(key.path / f"{name}.npy") for name in manifest["arrays"]}
        intact = all(_seal(array) == manifest["arrays"][name] for name, array in arrays.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
    return arrays if intact else None


def build_entry(key: Key, make: Make) -> None:
    """Build an entry from the result of ``make`` and publish it, unless it exists. Replaces a damaged entry.

    ``make`` runs in a separate process, because Megatron's C++ code and numpy's shuffle hold Python's global
    lock for minutes with 10^9 samples.

    Raises:
        OSError: the directory cannot be written.
    """
    if load(key) is not None:
        return
    key.directory.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(key.directory)
    partial = key.path.with_name(f"{key.path.name}{_PARTIAL}{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        run_in_fork(lambda: _write(partial, key.description, make()))
        _publish(partial, key)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(directory: Path, description: str, arrays: Arrays) -> None:
    seals = {name: _seal(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        with open(directory / f"{name}.npy", "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
    with open(directory / _MANIFEST, "w", encoding="utf-8") as text:
        strict_json.dump({"description": description, "arrays": seals}, text)
        text.flush()
        os.fsync(text.fileno())


def _publish(partial: Path, key: Key) -> None:
    """Rename ``partial`` to its final name. ``rename`` never replaces a directory that has files in it."""
    while load(key) is None:
        try:
            partial.rename(key.path)
            return
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        _remove_damaged(key, partial.with_name(f"{partial.name}-damaged"))


def _remove_damaged(key: Key, aside: Path) -> None:
    """Remove a damaged entry, after renaming it to ``aside``.

    Only the holder of the lock renames, and nobody can publish while the damaged entry exists. So this cannot
    remove a good entry that another process has published in the meantime.
    """
    handle = os.open(key.directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks on directories
            fcntl.flock(handle, fcntl.LOCK_EX)
        if load(key) is not None or not key.path.exists():
            return
        with suppress(FileNotFoundError):  # another host was faster
            key.path.rename(aside)
    finally:
        os.close(handle)
    if aside.is_dir():
        shutil.rmtree(aside)
    else:
        aside.unlink(missing_ok=True)


def _map(path: Path) -> np.ndarray:
    """Memory-map the array in a .npy file, opening it once. ``numpy.load`` would open it three times."""
    with open(path, "rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{path} was not written by this module")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(file, dtype, "r", file.tell(), shape)


def _seal(array: np.ndarray) -> list[object]:
    """Return the dtype and shape of an array, and a checksum of both its ends."""
    data = array.reshape(-1).view(np.uint8)
    ends = zlib.crc32(data[-_EDGE_BYTES:].tobytes(), zlib.crc32(data[:_EDGE_BYTES].tobytes()))
    return [array.dtype.str, list(array.shape), ends]


def _remove_abandoned(directory: Path) -> None:
    """Remove directories left behind by builders that were killed more than a day ago."""
    for path in directory.glob(f"*{_PARTIAL}*"):
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path)
        except OSError:  # another process removes it too
            continue


_PR_SET_PDEATHSIG = 1


def run_in_fork(work: Callable[[], None]) -> None:
    """Call ``work`` in a fork of this process and wait for it.

    A fork starts at once and needs no pickling. ``work`` must not use torch or CUDA, and writes its result to
    files. The fork dies with this process. Otherwise it would keep sockets open, and the other ranks would
    not notice that this process has died.

    Raises:
        RuntimeError: the fork was killed, for example because the host ran out of memory.
        Exception: what ``work`` raised.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, there, os.getpid()), daemon=True)
    process.start()
    there.close()
    try:
        error = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"a helper process ended early ({_ending(process.exitcode)}); check whether the host ran out of "
            "memory"
        ) from None
    finally:
        process.kill()  # it has ended already, unless this process was interrupted while waiting
        process.join()
        here.close()
    if error is not None:
        raise error


def _run(work: Callable[[], None], answer: Connection, parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the parent ends this one
    signal.set_wakeup_fd(-1)
    if os.getppid() != parent:
        return
    try:
        work()
    except Exception as error:
        error.add_note(f"In a helper process:\n{traceback.format_exc()}")
        answer.send(error)
    else:
        answer.send(None)


def _ending(status: int | None) -> str:
    return signal.Signals(-status).name if status is not None and status < 0 else f"exit status {status}"
