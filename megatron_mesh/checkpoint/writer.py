"""Writing a rank's part of a checkpoint: in the thread that trains, or in one of its own meanwhile."""

import io
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from megatron_mesh.checkpoint.boxes import Box
from megatron_mesh.checkpoint.index import Piece, Written
from megatron_mesh.checkpoint.integrity import sha256
from megatron_mesh.runtime import device, phases

WRITER_NAME = "ckpt-writer"
"""Beginning of the name of the thread that writes in the background."""


def file_of(rank: int) -> str:
    """Name of the file of a rank's tensors, as torch's distributed checkpoints name them."""
    return f"__{rank}_0.distcp"


def write_file(path: Path, boxes: Iterable[Box]) -> list[Written]:
    """Write boxes one after the other to ``path``, a new file, and make them last.

    Holds one box at a time besides what it was given.

    Raises:
        OSError: the disk will not have them.
    """
    written: list[Written] = []
    with path.open("xb") as file, _without_crc32():
        for box in boxes:
            phases.enter("writing a box")
            content = _serialized(box.data)
            piece = Piece(
                box.offset, tuple(box.data.shape), path.name, file.tell(), len(content), sha256(content)
            )
            file.write(content)
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


def _serialized(data: torch.Tensor) -> memoryview:
    """What ``torch.save`` writes, of the box alone and not of all the memory that it is a view of."""
    buffer = io.BytesIO()
    torch.save(data.detach().to("cpu", copy=True), buffer)
    return buffer.getbuffer()


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
