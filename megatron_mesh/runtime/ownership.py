"""Let only one start of a run at a time use its directory: only the owner trains, saves and deletes there.

Rank 0 claims the directory before it reads or changes anything in it. A second start is refused as long as
the owner is alive. On the same machine we look for the owner's process. From another machine we watch the
counter in the file, which the owner keeps raising; so no clocks are compared. The file is created by a link
and replaced by a rename, which are atomic on NFS too.

An owner that was wrongly considered dead (a suspended machine, a lost network) ends when it sees another
token.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from megatron_mesh.errors import UserError
from megatron_mesh.runtime import strict_json
from megatron_mesh.runtime.distributed import from_rank_zero
from megatron_mesh.runtime.health import Health
from megatron_mesh.runtime.owner_file import Owner, describe_this_process, given_token, read_owner
from megatron_mesh.runtime.run_files import OWNER_FILE

logger = logging.getLogger(__name__)

BEAT_SECONDS = 3.0
"""How often the owner raises its counter and checks that the token is still its own."""
TURN_SECONDS = 10.0
"""Age at which the lock file of a takeover, which takes milliseconds, counts as left behind by a crash."""
SILENCE_SECONDS = 20.0
"""How long the counter must not change before an owner on another machine counts as dead."""


@contextmanager
def owned(save: str | None, health: Health) -> Iterator[None]:
    """Own the directory ``save`` inside, if there is one; a collective operation.

    Raises:
        UserError: another start owns it, or the file cannot be written. Nothing was changed.
    """
    if save is None:
        yield
        return
    ownership = Ownership(Path(save))
    with health.busy("checking whether another run uses --save"):
        health.failures.token = from_rank_zero(ownership.claim)

    def lost(other: Owner) -> None:
        health.failures.leave_directory()
        health.abandon(f"{other} has taken over --save {save}; this run ends and writes nothing more to it")

    ownership.keep(lost)
    health.before_exit = ownership.release
    try:
        yield
    finally:
        ownership.release()


class Ownership:
    """A claim on ``directory``. Only rank 0 claims, keeps and releases.

    Attributes:
        token: identifies this start. If a batch script provides it, it is in the file already.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.path = directory, directory / OWNER_FILE
        self.token = given_token() or uuid4().hex
        self._given = given_token() is not None
        self._handle: int | None = None
        self._text = b""
        self._made: list[Path] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def claim(self) -> str:
        """Become the owner; returns the token.

        Raises:
            UserError: another start owns the directory, or it cannot be written.
        """
        try:
            self._made = [
                path for path in (self.directory, *self.directory.parents) if not os.path.exists(path)
            ]
            self.directory.mkdir(parents=True, exist_ok=True)
            self._text = f"{self.token}\n{strict_json.dumps(describe_this_process())}\n".encode()
            while not self._create():
                owner = read_owner(self.path)
                if owner is None:  # the owner has just released it
                    continue
                lives = owner.token != self.token and self._lives(owner)
                if lives:
                    raise UserError(
                        f"--save {self.directory} is in use by {owner}; wait until it ends, stop it, or "
                        "choose another directory"
                    )
                if lives is False and self._replace(owner):
                    break
        except OSError as error:
            self.release()
            reason = error.strerror or error
            raise UserError(f"--save {self.directory} cannot be written ({reason}); choose another") from None
        return self.token

    def _create(self) -> bool:
        """Create the file, unless it exists. It appears with its content, so nobody sees it empty."""
        if os.path.exists(self.path):
            return False
        try:
            self._write(_put)
        except FileExistsError:
            return False
        return True

    def _replace(self, dead: Owner) -> bool:
        """Replace a dead owner; False if another start was faster.

        Starts that have found the same dead owner take turns, and each reads the file again first. So none
        replaces the file of a start that was faster. The file is replaced atomically and is never missing.
        """
        turn = self.path.with_name(f"{OWNER_FILE}.takeover")
        try:
            os.close(os.open(turn, os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            _wait_for_turn(turn)
            return False
        try:
            now = read_owner(self.path)
            if now is None or now.token != dead.token:
                return False
            self._write(os.replace)
        finally:
            turn.unlink(missing_ok=True)
        return True

    def _write(self, put: Callable[[Path, Path], None]) -> None:
        """Write the file under a temporary name, and ``put`` it in place."""
        draft = self.path.with_name(f"{OWNER_FILE}.{uuid4().hex}")
        handle = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        try:
            os.write(handle, self._text + _counter(0))
            os.fsync(handle)
            put(draft, self.path)
        except OSError:
            os.close(handle)
            raise
        finally:
            draft.unlink(missing_ok=True)
        if self._handle is not None:
            os.close(self._handle)
        self._handle = handle

    def _lives(self, owner: Owner) -> bool | None:
        """Whether ``owner`` is alive; None if it is no longer the owner.

        If its process cannot be seen from here, wait for the counter to change.
        """
        lives = owner.lives()
        if lives is not None:
            return lives
        if owner.has_slurm_job():
            return True
        logger.info(
            "%s belongs to %s; waiting up to %.0f s to see whether that is still alive",
            self.directory,
            owner,
            SILENCE_SECONDS,
        )
        end = time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, BEAT_SECONDS / 2))
            now = read_owner(self.path)
            if now is None or now.token != owner.token:
                return None
            if now.text != owner.text:
                return True
        return False

    def keep(self, lost: Callable[[Owner], None]) -> None:
        """Keep raising the counter in a thread; call ``lost`` if another start has taken over."""
        if self._handle is not None:
            self._thread = threading.Thread(target=self._keep, args=(lost,), daemon=True, name="ownership")
            self._thread.start()

    def _keep(self, lost: Callable[[Owner], None]) -> None:
        count = 0
        while not self._over.wait(BEAT_SECONDS):
            count += 1
            with suppress(OSError):  # the file system may be unavailable for a moment
                owner = read_owner(self.path)
                if owner is not None and owner.token not in ("", self.token):
                    lost(owner)
                    return
                if owner is None:  # someone has removed the file
                    self._create()
                self._beat(count)

    def _beat(self, count: int) -> None:
        """Write the counter in place. The handle is our own file's, so another start's never changes."""
        assert self._handle is not None
        os.pwrite(self._handle, _counter(count), len(self._text))
        os.fsync(self._handle)

    def release(self) -> None:
        """Remove the file, unless a batch script will, and directories that were created but stayed empty."""
        if self._over.is_set():
            return
        self._over.set()
        if self._thread is not None:
            self._thread.join(BEAT_SECONDS)
        with suppress(OSError):
            owner = read_owner(self.path) if self._handle is not None and not self._given else None
            if owner is not None and owner.token == self.token:
                self.path.unlink()
        with suppress(OSError):  # stop at the first that is not empty
            for path in self._made:
                path.rmdir()


def _put(file: Path, name: Path) -> None:
    """Link ``file`` to ``name``; rename it on file systems without hard links.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        os.link(file, name)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644))  # reserve the name
        file.replace(name)


def _wait_for_turn(turn: Path) -> None:
    """Wait until no other start is taking over, and remove a lock file that a crash has left behind."""
    with suppress(FileNotFoundError):
        first, end = turn.stat(), time.monotonic() + TURN_SECONDS
        while (now := turn.stat()).st_ino == first.st_ino and now.st_mtime_ns == first.st_mtime_ns:
            if time.monotonic() > end:
                turn.unlink()
            time.sleep(0.05)


def _counter(count: int) -> bytes:
    return b"%012d\n" % count
