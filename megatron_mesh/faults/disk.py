"""A small disk to fill up: a tmpfs in a mount namespace that only the ranks under test join."""

import contextlib
import ctypes
import os
import shutil
import subprocess
from pathlib import Path

from megatron_mesh.errors import UserError

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
