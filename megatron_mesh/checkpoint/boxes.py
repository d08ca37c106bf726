"""Cuts tensors into boxes, the units in which a checkpoint stores them.

A rank holds a contiguous span of a parameter's elements: its shard of the distributed optimizer, or its part
of what replicas share. In the parameter's own shape that span is a few rectangular boxes, the chunks of
torch's distributed checkpoints. A rank of any other layout reads the boxes that overlap with its own, so
nothing is gathered for saving.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

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
