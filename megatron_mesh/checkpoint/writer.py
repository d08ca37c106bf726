"""Writing the tensors of a checkpoint: in this process, or in one of its own while training goes on."""

import ctypes
import io
import json
import logging
import os
import pickle
import queue
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as megatron_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import SaveCommonStrategy
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

from megatron_mesh.checkpoint.integrity import digest

logger = logging.getLogger(__name__)

WRITER_NAME = "ckpt-writer"
"""Name of a writer's process, as ``ps`` shows it."""

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


class SaveStrategy(megatron_strategy.TorchDistSaveShardedStrategy):
    """For ``dist_checkpointing.save(..., sharded_strategy=SaveStrategy())``: Megatron's plan, our writer."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def async_save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> AsyncRequest:
        with _replaced(megatron_strategy, "FileSystemWriterAsync", _Writer):
            return super().async_save(sharded_state_dict, checkpoint_dir)


class _Writer(filesystem_async.FileSystemWriterAsync):
    """Megatron's writer without its helper processes, which outlive a trainer that is killed.

    Megatron forks a process for each file, and starts a manager for the list of what was written. Here
    threads write the files, and the list goes through an unnamed file.
    """

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        with _replaced(filesystem_async, "_get_write_results_queue", _Results):
            super().prepare_write_data(plan, planner)

    def get_save_function_and_args(self) -> tuple[Callable | None, Callable | None, list]:
        function, preload, arguments = super().get_save_function_and_args()
        if function is None:
            return function, preload, arguments
        return partial(_write, os.getpid(), self.transforms), preload, arguments

    def finish(self, metadata: Any, results: Any) -> None:
        """Write ``.metadata``; called by the rank that coordinates, while the others wait for its word."""
        try:
            super().finish(metadata, results)
        except OSError as error:  # noticed by all when the files are checked
            logger.error("%s/.metadata cannot be written: %s", self.checkpoint_dir, error)


class CommonState(SaveCommonStrategy):
    """Takes what is not a tensor; rank 0 writes it later, when the other ranks do not wait for it."""

    def __init__(self) -> None:
        super().__init__("torch", 1)
        self.state = b""

    def can_handle_sharded_objects(self) -> bool:
        return True

    def save_common(self, common_state_dict: StateDict, checkpoint_dir: Any) -> None:
        buffer = io.BytesIO()
        torch.save(common_state_dict, buffer)  # now: training goes on and changes what it refers to
        self.state = buffer.getvalue()

    def write(self, directory: Path) -> None:
        """Write ``common.pt`` and the name of the format (``metadata.json``)."""
        (directory / COMMON_STATE_FNAME).write_bytes(self.state)
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))


def plan(sharded: ShardedStateDict, directory: Path) -> tuple[AsyncRequest, CommonState]:
    """Plan the writing of a checkpoint; a collective operation that writes nothing yet.

    Returns:
        A request whose ``async_fn`` writes this rank's tensors and whose first ``finalize_fns``, called by
        all ranks after it, gathers what was written; and what is not a tensor.
    """
    common = CommonState()
    with _replaced(serialization, "get_default_save_common_strategy", lambda: common):
        request = serialization.save(
            sharded, str(directory), sharded_strategy=SaveStrategy(), async_sharded_save=True
        )
    return request, common


class _Results:
    """What was written: put by one process, taken by the one that forked it, of any size."""

    def __init__(self) -> None:
        if sys.platform == "linux":  # in memory: no other disk may fail a save
            self._file: IO[bytes] = os.fdopen(os.memfd_create("written"), "w+b")
        else:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115

    def put(self, item: Any) -> None:
        self._file.seek(0)
        pickle.dump(item, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        self._file.seek(0)
        try:
            return pickle.load(self._file)  # from our own child, through a file that has no name
        except (EOFError, pickle.UnpicklingError):  # it was killed, perhaps while it put it
            raise queue.Empty from None


def _write(trainer: int, transforms: Any, rank: int, buckets: list, results: _Results) -> None:
    """Write this rank's files, each with its checksum; ``results`` gets what was written, or the failure."""
    if os.getpid() != trainer:
        _detach(trainer)
    with ThreadPoolExecutor(len(buckets)) as threads:
        written = list(threads.map(partial(_write_file, transforms), range(len(buckets)), buckets))
    failure = next((w for w in written if isinstance(w, Exception)), None)
    if failure is None:
        try:
            _write_digests(rank, [Path(path) for path, *_ in buckets])
        except OSError as error:
            failure = error
    results.put(dict(enumerate(written)) if failure is None else RuntimeError(_cause(failure)))


def _cause(failure: BaseException) -> str:
    """What the system said, if it did: where a disk is full torch complains of positions in its file."""
    cause: BaseException | None = failure
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return str(cause or failure)


def _write_file(transforms: Any, index: int, bucket: Any) -> Any:
    done: queue.Queue = queue.Queue()
    tokens: queue.Queue = queue.Queue()
    tokens.put(index)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        [transforms], index, bucket, done, tokens, use_fsync=True
    )
    return done.get()[1]


def digests_file(directory: Path, rank: int) -> Path:
    """Where a rank leaves the checksums of its files, until they are all in one list."""
    return directory / f"__{rank}.digests.json"


def _write_digests(rank: int, paths: list[Path]) -> None:
    digests = {path.name: digest(path) for path in paths}
    digests_file(paths[0].parent, rank).write_text(json.dumps(digests), encoding="utf-8")


def _detach(trainer: int) -> None:
    """A writer ignores the signals that stop a job, and does not outlive the trainer."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(_PR_SET_NAME, WRITER_NAME.encode())
    if os.getppid() != trainer:
        os._exit(1)


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Megatron takes the class from its module and has no parameter for it."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
