"""Writes a rank's tensors to its file of a checkpoint, in the training thread or in the background."""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch

from megatron_mesh.checkpoint.index import Box, Piece, Written
from megatron_mesh.runtime import device, phases

WRITER_NAME = "ckpt-writer"
"""Prefix of the name of the background thread."""


def file_of(rank: int) -> str:
    """Return the name of a rank's tensor file, as in torch's distributed checkpoints."""
    return f"__{rank}_0.distcp"


def write_file(path: Path, boxes: Iterable[Box]) -> list[Written]:
    """Write boxes to the new file ``path``, one after the other, and fsync it.

    Boxes in host memory are not copied. Boxes on a GPU are copied one at a time.

    Raises:
        OSError: the file cannot be written.
    """
    written: list[Written] = []
    with path.open("xb") as file, _without_crc32():
        for box in boxes:
            phases.enter("writing a box")
            start, stream = file.tell(), _Stream(file)
            stream.save(_with_own_storage(box.data))
            sizes = tuple(box.data.shape)
            piece = Piece(box.offset, sizes, path.name, start, stream.length, stream.sha256.hexdigest())
            written.append(Written(box.key, box.shape, box.data.dtype, piece))
        file.flush()
        os.fsync(file.fileno())
    return written


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Keep ``torch.save`` from computing CRC-32, which takes longer than our own checksum."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Stream:
    """A file object for ``torch.save`` that counts and hashes the bytes it passes on to a file."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._error: OSError | None = None
        self.length = 0
        self.sha256 = hashlib.sha256()

    def save(self, data: torch.Tensor) -> None:
        """Write a tensor. Raises the file's own OSError, which torch would hide behind a RuntimeError."""
        try:
            torch.save(data, self)  # type: ignore[arg-type]
        except RuntimeError:
            if self._error is not None:
                raise self._error from None
            raise

    def write(self, data: memoryview) -> int:
        """Write bytes; ``torch.save`` calls this."""
        self.sha256.update(data)
        self.length += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self._error = error
            raise

    def flush(self) -> None:
        """Do nothing when ``torch.save`` calls this: ``write_file`` flushes once, at the end."""


def _with_own_storage(data: torch.Tensor) -> torch.Tensor:
    """Return ``data`` in host memory, in a storage of its own, because ``torch.save`` writes entire storages.

    Contiguous data that is in host memory already is not copied.
    """
    held = data.detach().cpu().contiguous()
    start = held.storage_offset() * held.element_size()
    storage = held.untyped_storage()[start : start + held.nbytes]
    return torch.empty(0, dtype=held.dtype).set_(storage, 0, held.shape, held.stride())


class BackgroundWriter:
    """Writes copies of boxes in a thread, while training changes the originals.

    A forked process would be worse: it would make the system copy every page that training writes to, even of
    tensors that it doesn't save, and forking is not safe with GPU and network libraries loaded. A thread is
    fast enough, since copying, hashing and writing release Python's global lock.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=WRITER_NAME)

    def start(self, path: Path, boxes: Iterable[Box]) -> "Future[list[Written]]":
        """Copy ``boxes`` and return a future for the written pieces."""
        return self._thread.submit(_write_copies, path, host_copies(boxes))


def host_copies(boxes: Iterable[Box]) -> deque[Box]:
    """Copy the data of boxes to host memory."""
    return deque(replace(box, data=device.copy_to_host(box.data)) for box in boxes)


def _write_copies(path: Path, boxes: deque[Box]) -> list[Written]:
    phases.enter("writing in the background")
    return write_file(path, _consume(boxes))


def _consume(boxes: deque[Box]) -> Iterable[Box]:
    """Yield boxes and drop them, so that memory is freed as soon as it is written."""
    while boxes:
        yield boxes.popleft()
