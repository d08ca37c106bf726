"""Why a job ends, told once per cause: on stderr (SLURM's log, too), and in ``SAVE/run_status.txt``."""

import hashlib
import os
import socket
import sys
from pathlib import Path
from typing import Any

FAILED, RUNNING = "failed", "running"
STATUS_FILE = "run_status.txt"
"""Its first line is one word for scripts; further lines say why a run failed, one for each cause."""

_FIRST, _STATUS_NOTED = "failures/first", "failures/status_noted"


def place(rank: int, world_size: int) -> str:
    """A process of the job, in words."""
    return f"rank {rank} of {world_size} on host {socket.gethostname()}"


class Failures:
    """What the ranks of a job tell about its end.

    Args:
        store: a ``torch.distributed.Store`` that all ranks share. Without one, a rank speaks for itself.
        save: the run's directory (``--save``), or None.

    Attributes:
        running: whether this run has said ``running`` in ``run_status.txt``. Before that, a directory with
            such a file or with checkpoints may belong to another run, and is left alone.
    """

    def __init__(self, store: Any = None, save: str | None = None) -> None:
        self._store, self._save = store, save
        self.running = False

    def first(self, who: str, status: int) -> tuple[str, int]:
        """Note that ``who`` ends the job with exit status ``status``, unless another has noted so before.

        Returns the first one noted, which is the reason why the others end.
        """
        if self._store is None:
            return who, status
        try:
            noted = self._store.compare_set(_FIRST, "", f"{status} {who}").decode()
        except RuntimeError:  # torch's DistError: the store has gone with its process
            return "the rank that holds the job's store", 1
        number, _, name = noted.partition(" ")
        return name, int(number)

    def someone(self) -> tuple[str, int] | None:
        """The first one noted, if there is one. Doesn't wait."""
        try:
            if self._store is None or not self._store.check([_FIRST]):
                return None
        except RuntimeError:
            return None
        return self.first("", 1)

    def tell(self, who: str, cause: str, word: str, details: str = "") -> None:
        """Print and note why ``who`` ends, unless another rank has told the same cause before.

        Args:
            cause: the same text on all ranks that have the same problem.
            word: see ``note``.
            details: printed in place of the cause, such as a traceback.
        """
        if self.is_new(cause):
            print(f"error: {who}: {details or cause}", file=sys.stderr, flush=True)
            self.note(word, f"{who}: {cause}")

    def is_new(self, cause: str) -> bool:
        """Whether no rank has asked about this cause before."""
        if self._store is None:
            return True
        key = hashlib.sha256(cause.encode()).hexdigest()
        try:
            return self._store.add(f"failures/told/{key}", 1) == 1
        except RuntimeError:
            return True

    def note(self, word: str, text: str) -> None:
        """Add a line to the status file. A file that isn't this run's stays, and no directory is made.

        Args:
            word: the file's first line: ``failed`` if the same command would fail again, else ``running``.
        """
        if self._save is None:
            return
        path = Path(self._save) / STATUS_FILE
        line = " ".join(text.split()) + "\n"
        try:
            if self._store is not None and self._store.check([_STATUS_NOTED]):
                with path.open("a", encoding="utf-8") as file:
                    file.write(line)
            elif self.running:
                partial = path.with_suffix(".partial")
                partial.write_text(f"{word}\n{line}", encoding="utf-8")
                os.replace(partial, path)
            elif not _is_another_runs(path.parent):
                with path.open("x", encoding="utf-8") as file:
                    file.write(f"{word}\n{line}")
            else:
                return
            if self._store is not None:
                self._store.set(_STATUS_NOTED, "")
        except (OSError, RuntimeError):  # stderr has it
            return


def _is_another_runs(save: Path) -> bool:
    """Whether ``save`` holds checkpoints. A job that ``submit_slurm.py`` has sent owns it all the same."""
    return any(save.glob("iter_*")) and not (save / "slurm" / "owner").exists()
