"""Turn out-of-memory errors into one message with remedies.

Report why a job ends, once per cause, on stderr (which is SLURM's log) and in ``SAVE/run_status.txt``.
"""

import hashlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_mesh.config.schema import Config
from megatron_mesh.errors import OutOfMemory
from megatron_mesh.runtime.owner_file import given_token, held_by_another
from megatron_mesh.runtime.run_files import CHECKPOINTS, STATUS_FILE, replace_text

logger = logging.getLogger(__name__)


@contextmanager
def explain_out_of_memory(remedies: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Turn torch's out-of-memory error into ``OutOfMemory``. Its traceback is logged at debug level.

    Args:
        remedies: settings to try, cheapest first.
    """
    try:
        yield
    except RuntimeError as error:  # the base class of torch's own error
        from megatron_mesh.runtime import device  # not at the top: --help and input errors don't need torch

        if not device.is_out_of_memory(error):
            raise
        logger.debug("out of memory", exc_info=True)
        reason = str(error).strip().splitlines()[0]
        raise OutOfMemory(f"out of memory: {reason}\ntry: {'; '.join(remedies())}") from error


def remedies(config: Config) -> list[str]:
    """List what would make a run with these (resolved) settings need less memory, cheapest first."""
    training, parallel = config.training, config.parallel
    found = []
    size = training.micro_batch_size
    if size > 1:
        smaller = max(n for n in range(1, size) if not size % n)
        found.append(f"--micro-batch-size {smaller} (the same global batch in more micro-batches)")
    if training.recompute_granularity is None:
        found.append("--recompute-granularity selective --recompute-modules core_attn mlp")
    if training.recompute_granularity != "full":
        found.append("--recompute-granularity full (steps take about a third longer)")
    if not training.bf16:
        found.append("--bf16")
    if not parallel.use_distributed_optimizer:
        found.append("--use-distributed-optimizer (with several data-parallel ranks)")
    ranks = 2 * parallel.tensor_model_parallel_size
    if config.model.num_attention_heads % ranks == 0:
        found.append(f"--tensor-model-parallel-size {ranks} --sequence-parallel (needs {ranks} or more GPUs)")
    return [*found, "--dry-run shows what each rank needs"]


FAILED, RUNNING = "failed", "running"
TURN_SECONDS = 5.0
"""How long a rank waits for its turn to write to the status file."""

_FIRST, _OVER, _INFORMED, _NOTES = (f"failures/{name}" for name in ("first", "over", "informed", "notes"))


def describe_rank(rank: int, world_size: int) -> str:
    """Describe a process of the job."""
    return f"rank {rank} of {world_size} on host {socket.gethostname()}"


class Failures:
    """Reports failures, and coordinates with the other ranks so that each cause is reported once.

    Args:
        store: a ``torch.distributed.Store`` that all ranks share. Without one, a rank reports by itself.
        save: the run's directory (``--save``), or None.
        resumes: whether the command continues the run in ``save`` (see ``resumes``).

    Attributes:
        token: names this start, once it owns ``save`` (``ownership.py``).
        running: whether this run has written ``running`` to ``run_status.txt``. Before that, a directory with
            such a file or with checkpoints may belong to another run, and is left alone unless ``resumes``.
        is_informed: whether this rank knows how the job ends, and no longer needs the store.
    """

    def __init__(self, store: Any = None, save: str | None = None, resumes: bool = False) -> None:
        self._store, self._save, self._resumes = store, save, resumes
        self.running = False
        self.token: str | None = None
        self._lock = threading.Lock()
        self._first: tuple[str, int] | None = None
        self._new: dict[str, bool] = {}
        self.is_informed = False

    def note_first(self, who: str, status: int) -> tuple[str, int]:
        """Record that ``who`` ends the job with exit status ``status``, unless another rank came first.

        Returns the rank that came first, and its status: it is the reason why the others end.
        """
        if self._first is not None or self._store is None:
            return self._first or (who, status)
        try:
            noted = self._store.compare_set(_FIRST, "", f"{status} {who}")
        except RuntimeError:  # torch's DistError: the store is gone
            return who, status
        return self._remember(noted)

    def first_failure(self) -> tuple[str, int] | None:
        """The rank that failed first and its exit status, if any has failed. Doesn't wait.

        Raises:
            torch.distributed.DistError: the store is gone.
        """
        if self._first is None and self._store is not None and self._store.check([_FIRST]):
            self._remember(self._store.get(_FIRST))
        return self._first

    def _remember(self, noted: bytes) -> tuple[str, int]:
        number, _, name = noted.decode().partition(" ")
        self._first = name, int(number)
        return self._first

    def mark_success(self) -> None:
        """Record that the job has ended without a failure, so the end of the store is no failure either."""
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.set(_OVER, "")

    def has_succeeded(self) -> bool:
        """Whether the job has ended without a failure.

        Raises:
            torch.distributed.DistError: the store is gone.
        """
        return self._store is not None and self._store.check([_OVER])

    def mark_informed(self) -> None:
        """Let the other ranks know that this one ``is_informed``."""
        with self._lock:
            first_time, self.is_informed = not self.is_informed, True
        if first_time and self._store is not None:
            with suppress(RuntimeError):
                self._store.add(_INFORMED, 1)

    def wait_until_informed(self, ranks: int, seconds: float) -> None:
        """Wait until ``ranks`` ranks know how the job ends, but at most ``seconds``: some may be dead."""
        end = time.monotonic() + seconds
        with suppress(RuntimeError):
            while self._store is not None and time.monotonic() < end:
                if self._store.add(_INFORMED, 0) >= ranks:
                    return
                time.sleep(0.2)

    def drop_store(self) -> bool:
        """Report without the other ranks from now on; returns whether there was a store."""
        with self._lock:
            store, self._store = self._store, None
        return store is not None

    def leave_directory(self) -> None:
        """Write nothing to ``save`` from now on, because another start owns it."""
        self._save = None

    def report(self, who: str, cause: str, word: str, details: str = "") -> None:
        """Print why ``who`` ends and write it to the status file, unless another rank has reported this
        cause.

        Args:
            cause: the same text on all ranks that have the same problem.
            word: see ``note``.
            details: printed instead of the cause, for example a traceback.
        """
        if self.is_first_report(cause):
            print(f"error: {who}: {details or cause}", file=sys.stderr, flush=True)
            self.note(word, f"{who}: {cause}")

    def has_reported(self, cause: str) -> bool:
        """Whether this rank has reported the cause."""
        with self._lock:
            return self._new.get(cause, False)

    def silence(self, cause: str) -> None:
        """Let no rank report the cause from now on."""
        self.is_first_report(cause)
        with self._lock:
            self._new[cause] = False

    def is_first_report(self, cause: str) -> bool:
        """Whether this rank is the first to ask about this cause. Later calls give the same answer."""
        with self._lock:
            if cause not in self._new:
                self._new[cause] = self._claim_report(cause)
            return self._new[cause]

    def _claim_report(self, cause: str) -> bool:
        if self._store is None:
            return True
        key = hashlib.sha256(cause.encode()).hexdigest()
        try:
            return self._store.add(f"failures/told/{key}", 1) == 1
        except RuntimeError:
            return True

    def note(self, word: str, text: str) -> None:
        """Add a line to the status file. Leave another run's file alone, and create no directory.

        Ranks take turns, so that the first one writes the word and no line is lost.

        Args:
            word: the file's first line: ``failed`` if the same command would fail again, else ``running``.
        """
        if self._save is None:
            return
        path, line = Path(self._save) / STATUS_FILE, " ".join(text.split()) + "\n"
        if self._store is None:
            with suppress(OSError):  # the text is on stderr too
                self._write(path, word, line, ours=self.running)
            return
        with suppress(RuntimeError):  # the store is gone, or another rank takes too long
            turn = self._store.add(_NOTES, 1)
            ours = turn > 1 and self._wait_for_turn(turn)
            with suppress(OSError):
                ours = self._write(path, word, line, ours)
            self._store.set(f"{_NOTES}/{turn}", "ours" if ours else "not ours")

    def _wait_for_turn(self, turn: int) -> bool:
        """Wait for the previous rank to write; returns whether the status file belongs to this run."""
        earlier = f"{_NOTES}/{turn - 1}"
        self._store.wait([earlier], timedelta(seconds=TURN_SECONDS))
        return self._store.get(earlier) == b"ours"

    def _write(self, path: Path, word: str, line: str, ours: bool) -> bool:
        """Append to the file if it is ``ours``, else create it; returns whether it is this run's now."""
        if not self.running and held_by_another(path.parent, self.token):
            return False
        if ours:
            _append(path, line)
        elif self.running:
            replace_text(path, word + "\n" + line)
        elif self._resumes and os.path.exists(path):
            found = path.read_text(encoding="utf-8")
            if found.partition("\n")[0] != RUNNING:
                replace_text(path, word + "\n" + line)
            elif line not in found:
                # Either the previous start crashed, or it is still running and this start is a mistake.
                _append(path, line)
        elif self._resumes or not _is_another_runs(path.parent):
            with path.open("x", encoding="utf-8") as file:
                file.write(word + "\n" + line)
        else:
            return False
        return True


def resumes(save: str | None, load: str | None, finetune: bool) -> bool:
    """Whether a command with these settings continues the run in ``save``, if there is one."""
    if save is None or load is None or finetune:
        return False
    return os.path.realpath(save) == os.path.realpath(load)


def _append(path: Path, line: str) -> None:
    """Append a line to a file, which must exist."""
    with open(path, "a", encoding="utf-8", opener=_no_new_file) as file:
        file.write(line)


def _no_new_file(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_CREAT)


def _is_another_runs(save: Path) -> bool:
    """Whether ``save`` holds checkpoints. A batch script that has claimed it owns it all the same."""
    return any(save.glob(CHECKPOINTS)) and given_token() is None
