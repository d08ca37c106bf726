"""Reads boxes from a checkpoint. Each stored piece is read once per process and verified by its checksum."""

import io
import math
import os
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_mesh.checkpoint.index import Box, Entry, Index, Piece
from megatron_mesh.checkpoint.integrity import sha256
from megatron_mesh.errors import UserError

_THREADS = 4
"""Reader threads per file. Each holds one piece in memory."""


class Damaged(UserError):
    """A checkpoint, or the part of it that was read, is incomplete or has changed since it was written."""


class _Copy(NamedTuple):
    """A part of a stored piece, and the memory to copy it to."""

    target: Tensor
    start: tuple[int, ...]
    lengths: tuple[int, ...]


def fill(index: Index, boxes: Iterable[Box]) -> int:
    """Read ``boxes`` into their memory; return the number of bytes read.

    Values are converted to the dtype of the memory. A ``padded`` box is zero where the checkpoint has no
    values.

    Raises:
        Damaged: parts are missing or have changed since they were written.
    """
    wanted: dict[str, list[Box]] = defaultdict(list)
    for box in boxes:
        wanted[box.key].append(box)
    files: dict[str, dict[Piece, list[_Copy]]] = defaultdict(lambda: defaultdict(list))
    for key, targets in wanted.items():
        if key not in index.entries:
            raise Damaged(f"the tensor {key} is missing")
        for piece, copy in _copies(key, index.entries[key], targets):
            files[piece.file][piece].append(copy)
    with _no_added_classes():
        return sum(_read_file(index, name, pieces) for name, pieces in files.items())


def read_tensor(index: Index, key: str, *, layer: int | None = None) -> Tensor:
    """Read a tensor, or one layer of a tensor of stacked layers, into host memory.

    Raises:
        KeyError: the checkpoint has no such tensor.
        Damaged: see ``fill``.
    """
    entry = index.entries[key]
    shape, offset = entry.shape, (0,) * len(entry.shape)
    if layer is not None:
        shape, offset = (1, *shape[1:]), (layer, *offset[1:])
    data = torch.empty(shape, dtype=entry.dtype)
    fill(index, [Box(key, entry.shape, offset, data)])
    return data if layer is None else data.squeeze(0)


def read_piece(index: Index, piece: Piece) -> Tensor:
    """Read a stored piece into host memory.

    Raises:
        Damaged: see ``fill``.
    """
    path = index.directory / piece.file
    try:
        with path.open("rb") as file, _no_added_classes():
            return _tensor(piece, _content(file, piece))
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror})") from error


def read_values(path: Path) -> Any:
    """Read the plain values in a file of ``torch.save``, without executing any code in it.

    Raises:
        UserError: the file holds more than tensors and plain values.
    """
    try:
        with _no_added_classes():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} cannot be trusted: it holds more than tensors and plain values; use another checkpoint"
        ) from error


def _copies(key: str, entry: Entry, targets: list[Box]) -> Iterable[tuple[Piece, _Copy]]:
    """Yield the pieces to read and what to copy from each, by torch's resharding rules."""
    stored = TensorStorageMetadata(
        TensorProperties(dtype=entry.dtype),
        torch.Size(entry.shape),
        [ChunkStorageMetadata(torch.Size(p.offset), torch.Size(p.sizes)) for p in entry.pieces],
    )
    chunks = [ChunkStorageMetadata(torch.Size(b.offset), b.data.shape) for b in targets]
    missing = [box.data.numel() for box in targets]
    pieces = {piece.offset: piece for piece in entry.pieces}
    if sum(math.prod(piece.sizes) for piece in entry.pieces) != math.prod(entry.shape):
        raise Damaged(f"parts of {key} are missing")
    for box in targets:
        if box.padded:
            box.data.zero_()
        elif box.shape != entry.shape:
            raise Damaged(f"{key} has shape {list(entry.shape)} in the checkpoint and {list(box.shape)} here")
    for item in create_read_items_for_chunk_list(key, stored, chunks):
        number = item.dest_index.index
        assert number is not None and item.storage_index.offset is not None
        target = _narrowed(targets[number].data, item.dest_offsets, item.lengths)
        missing[number] -= target.numel()
        piece = pieces[tuple(item.storage_index.offset)]
        yield piece, _Copy(target, tuple(item.storage_offsets), tuple(item.lengths))
    if any(count and not box.padded for count, box in zip(missing, targets, strict=True)):
        raise Damaged(f"parts of {key} are missing")


def _read_file(index: Index, name: str, pieces: Mapping[Piece, list[_Copy]]) -> int:
    """Read the pieces of one file; return the number of bytes read."""
    ordered = sorted(pieces, key=lambda piece: piece.start)
    try:
        with (index.directory / name).open("rb") as file:

            def read(piece: Piece) -> int:
                tensor = _tensor(piece, _content(file, piece))
                for copy in pieces[piece]:
                    copy.target.copy_(_narrowed(tensor, copy.start, copy.lengths))
                return piece.length

            if len(ordered) == 1:
                return read(ordered[0])
            with ThreadPoolExecutor(_THREADS) as threads:
                return sum(threads.map(read, ordered))
    except OSError as error:
        raise Damaged(f"{name} cannot be read ({error.strerror})") from error


def _content(file: BinaryIO, piece: Piece) -> bytes:
    """Read the bytes of a piece, or fewer if the file ends early. One system call reads at most 2 GiB."""
    parts, left = [], piece.length
    while left and (part := os.pread(file.fileno(), left, piece.start + piece.length - left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _tensor(piece: Piece, content: bytes) -> Tensor:
    if len(content) != piece.length:
        raise Damaged(f"{piece.file} ends before byte {piece.start + piece.length:,}")
    if piece.sha256 is not None and sha256(content) != piece.sha256:
        raise Damaged(f"{piece.file} was changed after it was written (its checksum doesn't match)")
    try:
        tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        refused = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors and plain values" if refused else str(error)
        raise Damaged(f"{piece.file} cannot be trusted: {reason}") from error
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != piece.sizes:
        raise Damaged(f"{piece.file} cannot be trusted: its contents do not match .metadata")
    return tensor


@contextmanager
def _no_added_classes() -> Iterator[None]:
    """Let torch unpickle only its own classes: temporarily clear its list of allowed globals.

    Libraries add classes to that list, such as NumPy's arrays, whose pickles may hold memory addresses.
    """
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(added)


def _narrowed(tensor: Tensor, start: Iterable[int], lengths: Iterable[int]) -> Tensor:
    for dimension, (first, length) in enumerate(zip(start, lengths, strict=True)):
        tensor = tensor.narrow(dimension, first, length)
    return tensor
