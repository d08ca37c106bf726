"""Cuts tensors into boxes, the units in which a checkpoint stores them.

A rank holds a contiguous span of a parameter's elements: its shard of the distributed optimizer, or its part
of what replicas share. In the parameter's own shape that span is a few rectangular boxes, the chunks of
torch's distributed checkpoints. A rank of any other layout reads the boxes that overlap with its own, so
nothing is gathered for saving.

The index of a checkpoint: the file and position of every box of every tensor.

On disk it is the ``.metadata`` file of torch's distributed checkpoints, which torch's own readers can read,
too. That file is a pickle, and people load other people's checkpoints. So we read it with an unpickler that
accepts only the few classes it needs. Tensors are read with ``weights_only=True``.
"""

import math
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_mesh.checkpoint.integrity import CHECKSUMS_FILE, Digests
from megatron_mesh.compat.torch_internals import METADATA_CLASSES, StorageInfo
from megatron_mesh.errors import UserError

MAX_ELEMENTS = 2**21
"""Size limit of a box (8 MiB in float32). Other rank layouts have to read entire boxes, so they are small."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A box of a tensor in a checkpoint, and the memory to write it from or read it into."""

    key: str
    """Name of the tensor."""
    shape: Shape
    """Shape of the full tensor."""
    offset: Shape
    """Position of the box's first element in the full tensor."""
    data: Tensor
    """The memory. Its shape is that of the box."""
    padded: bool = False
    """Whether the full tensor may have another size in the checkpoint, because the vocabulary is padded."""


def split_span(
    sizes: Shape, start: int, end: int, limit: int = MAX_ELEMENTS
) -> Iterator[tuple[Shape, Shape]]:
    """Yield the boxes, as offset and sizes, that cover elements ``start`` to ``end`` (exclusive) of a tensor.

    They come in element order. Each is contiguous and has at most ``limit`` elements.
    """
    if start >= end:
        return
    if not sizes:
        yield (), ()
        return
    row = math.prod(sizes[1:])
    while start < end:
        first, within = divmod(start, row)
        rows = min((end - start) // row, limit // row) if within == 0 else 0
        if rows:
            yield (first, *[0] * (len(sizes) - 1)), (rows, *sizes[1:])
            start += rows * row
            continue
        stop = min(end, (first + 1) * row)
        for offset, inner in split_span(sizes[1:], within, within + stop - start, limit):
            yield (first, *offset), (1, *inner)
        start = stop


def span_as_boxes(key: str, place: ShardedTensor, start: int, end: int, data: Tensor) -> Iterator[Box]:
    """Yield elements ``start`` to ``end`` of a rank's tensor as boxes of the full tensor.

    Args:
        key: name of the full tensor in the checkpoint.
        place: the position of the rank's tensor in the full one. Its data are not used.
        data: the elements, [end - start], contiguous.
    """
    whole = tuple(place.global_shape)
    leading = len(whole) - len(place.local_shape)  # dimensions of stacked layers
    begin = tuple(place.global_offset)
    done = 0
    for offset, sizes in split_span(tuple(place.local_shape), start, end):
        count = math.prod(sizes)
        moved = (*begin[:leading], *(a + b for a, b in zip(begin[leading:], offset, strict=True)))
        view = data[done : done + count].view((*[1] * leading, *sizes))
        yield Box(key, whole, moved, view, padded=place.allow_shape_mismatch)
        done += count


def cut(key: str, shape: Shape, data: Tensor, offset: Shape | None = None) -> Iterator[Box]:
    """Cut a large box into boxes of at most ``MAX_ELEMENTS``.

    Args:
        key: name of the full tensor.
        shape: shape of the full tensor.
        data: the elements of the large box.
        offset: position of the large box in the full tensor; by default its beginning.
    """
    begin = offset or (0,) * len(shape)
    flat, done = data.detach().reshape(-1), 0
    for inner, sizes in split_span(tuple(data.shape), 0, flat.numel()):
        count = math.prod(sizes)
        moved = tuple(a + b for a, b in zip(begin, inner, strict=True))
        yield Box(key, shape, moved, flat[done : done + count].view(sizes))
        done += count


def tensor_as_boxes(place: ShardedTensor) -> Iterator[Box]:
    """Yield a rank's entire tensor ``place.data`` as boxes of the full tensor."""
    data = place.data
    yield from span_as_boxes(place.key, place, 0, data.numel(), data.detach().view(-1))


INDEX_FILE = ".metadata"


class Piece(NamedTuple):
    """A box of a tensor on disk: the output of ``torch.save``, inside a larger file."""

    offset: Shape
    sizes: Shape
    file: str
    start: int
    """Position of the first byte."""
    length: int
    """Number of bytes."""
    sha256: str | None
    """None in checkpoints of format 2, which have one checksum per file."""


class Written(NamedTuple):
    """A piece that was just written, with the tensor that it belongs to."""

    key: str
    shape: Shape
    dtype: torch.dtype
    piece: Piece


@dataclass
class Entry:
    """A tensor in a checkpoint, and its pieces."""

    shape: Shape
    dtype: torch.dtype
    pieces: list[Piece] = field(default_factory=list)


@dataclass(frozen=True)
class Index:
    """The tensors of the checkpoint in ``directory``, by key."""

    directory: Path
    entries: dict[str, Entry]


def index_of(directory: Path, written: Iterable[Written]) -> Index:
    """Build the index of the pieces that all ranks have written to ``directory``."""
    entries: dict[str, Entry] = {}
    for key, shape, dtype, piece in written:
        entries.setdefault(key, Entry(shape, dtype)).pieces.append(piece)
    return Index(directory, entries)


def index_file(index: Index) -> bytes:
    """Return the contents of ``.metadata``."""
    tensors: dict[str, Any] = {}
    places = {}
    for key, entry in index.entries.items():
        chunks = [ChunkStorageMetadata(torch.Size(p.offset), torch.Size(p.sizes)) for p in entry.pieces]
        tensors[key] = TensorStorageMetadata(
            TensorProperties(dtype=entry.dtype), torch.Size(entry.shape), chunks
        )
        for number, piece in enumerate(entry.pieces):
            place = MetadataIndex(key, piece.offset, number)
            places[place] = StorageInfo(piece.file, piece.start, piece.length)
    paths = {key: (key,) for key in tensors}
    metadata = Metadata(tensors, planner_data=paths, storage_data=places)
    return pickle.dumps(metadata)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")


def read_index(directory: Path, digests: Digests | None = None) -> Index:
    """Read ``.metadata``.

    Args:
        directory: the checkpoint.
        digests: checksums of the pieces, which are compared when tensors are read. None for format 2, which
            has none per piece, and for callers that read no tensors.

    Raises:
        UserError: the file is missing, damaged or holds something else, or a piece has no checksum.
    """
    path = directory / INDEX_FILE
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it is not a list of tensors")
        index = _index(directory, metadata, digests or {})
        if not index.entries:
            raise pickle.UnpicklingError("it is not a list of tensors")
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing, so {directory} is not a complete checkpoint; use another checkpoint"
        ) from None
    # A damaged pickle can raise any exception.
    except Exception as error:
        raise UserError(f"{path} cannot be trusted: {error}; use another checkpoint") from error
    pieces = (piece for entry in index.entries.values() for piece in entry.pieces)
    if digests is not None and any(piece.sha256 is None for piece in pieces):
        raise UserError(
            f"{directory / CHECKSUMS_FILE} has no checksums for some tensors; use another checkpoint"
        )
    return index


def _index(directory: Path, metadata: Metadata, digests: Digests) -> Index:
    sums = {
        (file, start): (length, sha256)
        for file, pieces in digests.items()
        for start, length, sha256 in _with_starts(pieces)
    }
    entries: dict[str, Entry] = {}
    for index, place in metadata.storage_data.items():
        if len(PurePosixPath(place.relative_path).parts) != 1 or place.relative_path == "..":
            raise pickle.UnpicklingError(f"it refers to a file outside the checkpoint, {place.relative_path}")
        tensor = metadata.state_dict_metadata[index.fqn]
        if not isinstance(tensor, TensorStorageMetadata):
            continue
        entry = entries.setdefault(index.fqn, Entry(tuple(tensor.size), tensor.properties.dtype))
        length, sha256 = sums.get((place.relative_path, place.offset), (None, None))
        entry.pieces.append(
            Piece(
                tuple(index.offset or ()),
                _sizes(tensor, index),
                place.relative_path,
                place.offset,
                place.length,
                sha256 if length == place.length else None,
            )
        )
    return Index(directory, entries)


def _with_starts(pieces: Iterable[tuple[int, str]]) -> Iterable[tuple[int, int, str]]:
    start = 0
    for length, sha256 in pieces:
        yield start, length, sha256
        start += length


def _sizes(tensor: TensorStorageMetadata, index: MetadataIndex) -> Shape:
    offset = torch.Size(index.offset or ())
    hint = index.index
    if hint is not None and hint < len(tensor.chunks) and tensor.chunks[hint].offsets == offset:
        return tuple(tensor.chunks[hint].sizes)
    return next(tuple(chunk.sizes) for chunk in tensor.chunks if chunk.offsets == offset)
