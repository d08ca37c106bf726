"""Boxes: what a checkpoint stores of a tensor, and what a rank asks of it.

A rank holds a contiguous run of a parameter's elements: its shard of the distributed optimizer, or its part
of what replicas share. Such a run is a few boxes of the parameter's own shape, and boxes are what torch's
distributed checkpoints hold. Any other layout of ranks finds what it needs by overlap, and nothing is
gathered.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

MAX_ELEMENTS = 2**21
"""Largest box (8 MiB in float32). Readers with another layout read whole boxes, so they are small."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A box of a tensor in a checkpoint, and the memory that it is written from or read into."""

    key: str
    """Name of the tensor."""
    shape: Shape
    """Of the whole tensor."""
    offset: Shape
    """Where in it the box begins."""
    data: Tensor
    """As large as the box."""
    padded: bool = False
    """Whether the whole tensor may be larger or smaller in the checkpoint (a vocabulary's padding)."""


def split_span(
    sizes: Shape, start: int, end: int, limit: int = MAX_ELEMENTS
) -> Iterator[tuple[Shape, Shape]]:
    """The boxes, as offset and sizes, that elements ``start`` to ``end`` (exclusive) of a tensor make up.

    They come in the order of the elements, each is contiguous, and none has more than ``limit`` elements.
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
    """Elements ``start`` to ``end`` of a rank's tensor as boxes of the whole tensor.

    Args:
        key: name of the whole tensor in the checkpoint.
        place: where in the whole tensor the rank's one lies; its data are not looked at.
        data: the elements, [end - start], contiguous.
    """
    whole = tuple(place.global_shape)
    leading = len(whole) - len(place.local_shape)  # of stacked layers
    begin = tuple(place.global_offset)
    done = 0
    for offset, sizes in split_span(tuple(place.local_shape), start, end):
        count = math.prod(sizes)
        moved = (*begin[:leading], *(a + b for a, b in zip(begin[leading:], offset, strict=True)))
        view = data[done : done + count].view((*[1] * leading, *sizes))
        yield Box(key, whole, moved, view, padded=place.allow_shape_mismatch)
        done += count


def cut(key: str, shape: Shape, data: Tensor, offset: Shape | None = None) -> Iterator[Box]:
    """A large box as boxes that are small enough.

    Args:
        key: name of the whole tensor.
        shape: of the whole tensor.
        data: the box's elements.
        offset: where in the whole tensor it begins; default: with the first element.
    """
    begin = offset or (0,) * len(shape)
    flat, done = data.detach().reshape(-1), 0
    for inner, sizes in split_span(tuple(data.shape), 0, flat.numel()):
        count = math.prod(sizes)
        moved = tuple(a + b for a, b in zip(begin, inner, strict=True))
        yield Box(key, shape, moved, flat[done : done + count].view(sizes))
        done += count


def tensor_as_boxes(place: ShardedTensor) -> Iterator[Box]:
    """A rank's whole tensor, which ``place`` holds, as boxes."""
    data = place.data
    yield from span_as_boxes(place.key, place, 0, data.numel(), data.detach().view(-1))
