"""Writing a rank's part of a checkpoint: in the training thread or in a background thread."""

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

from megatron_mesh.checkpoint.boxes import Box
from megatron_mesh.checkpoint.index import Piece, Written
from megatron_mesh.runtime import device, phases

WRITER_NAME = "ckpt-writer"
"""Beginning of the name of the thread that writes in the background."""


def file_of(rank: int) -> str:
    """Name of the file of a rank's tensors, as torch's distributed checkpoints name them."""
    return f"__{rank}_0.distcp"


def write_file(path: Path, boxes: Iterable[Box]) -> list[Written]:
    """Write boxes one after the other to ``path``, a new file, and fsync it.

    Boxes in host memory are not copied; those on a GPU are copied one at a time.

    Raises:
        OSError: the disk will not have them.
    """
    written: list[Written] = []
    with path.open("xb") as file, _without_crc32():
        for box in boxes:
            phases.enter("writing a box")
            start, stream = file.tell(), _Stream(file)
            stream.save(_alone(box.data))
            sizes = tuple(box.data.shape)
            piece = Piece(box.offset, sizes, path.name, start, stream.length, stream.sha256.hexdigest())
            written.append(Written(box.key, box.shape, box.data.dtype, piece))
        file.flush()
        os.fsync(file.fileno())
    return written


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Keep torch from computing a second checksum, which takes longer than the one that we need."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Stream:
    """Passes what ``torch.save`` writes on to a file; counts the bytes and computes their checksum."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._error: OSError | None = None
        self.length = 0
        self.sha256 = hashlib.sha256()

    def save(self, data: torch.Tensor) -> None:
        """Write a tensor; raises what the file raises, for which torch has another error."""
        try:
            torch.save(data, self)  # type: ignore[arg-type]
        except RuntimeError:
            if self._error is not None:
                raise self._error from None
            raise

    def write(self, data: memoryview) -> int:
        """Called by ``torch.save``."""
        self.sha256.update(data)
        self.length += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self._error = error
            raise

    def flush(self) -> None:
        """Called by ``torch.save``; ``write_file`` flushes once, at its end."""


def _alone(data: torch.Tensor) -> torch.Tensor:
    """``data`` in host memory whose storage holds nothing else, since ``torch.save`` writes all of a storage.

    Contiguous data that is in host memory already is not copied.
    """
    held = data.detach().cpu().contiguous()
    start = held.storage_offset() * held.element_size()
    storage = held.untyped_storage()[start : start + held.nbytes]
    return torch.empty(0, dtype=held.dtype).set_(storage, 0, held.shape, held.stride())


class BackgroundWriter:
    """Writes copies of what it is given, while training changes the originals.

    It is a thread, not a process: a forked one would keep every page that training writes to, of weights that
    it does not save too, and a fork of a process with a GPU's and network libraries is not safe. The work is
    copying, checksums and writing, for which Python's lock is not held.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=WRITER_NAME)

    def start(self, path: Path, boxes: Iterable[Box]) -> "Future[list[Written]]":
        """Copy ``boxes`` and return; the result comes when they are written."""
        return self._thread.submit(_write_copies, path, copies(boxes))


def copies(boxes: Iterable[Box]) -> deque[Box]:
    """Boxes whose elements are copied to host memory of their own."""
    return deque(replace(box, data=device.copy_to_host(box.data)) for box in boxes)


def _write_copies(path: Path, boxes: deque[Box]) -> list[Written]:
    phases.enter("writing in the background")
    return write_file(path, _each_once(boxes))


def _each_once(boxes: deque[Box]) -> Iterable[Box]:
    """Give memory back as soon as it is written."""
    while boxes:
        yield boxes.popleft()
