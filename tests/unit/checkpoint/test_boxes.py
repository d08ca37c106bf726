"""Spans of elements become boxes, and boxes are read from stored boxes that overlap with them."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mesh.checkpoint.index import MAX_ELEMENTS, Box, cut, index_of, split_span
from megatron_mesh.checkpoint.reader import Damaged, fill, read_tensor
from megatron_mesh.checkpoint.writer import write_file

SHAPES = st.lists(st.integers(1, 6), max_size=4).map(tuple)


def runs(count: int, draw: st.DrawFn) -> list[tuple[int, int]]:
    """Cut ``count`` elements into spans."""
    edges = sorted({0, count, *draw(st.lists(st.integers(0, count), max_size=4))})
    return list(itertools.pairwise(edges))


def boxes(whole: torch.Tensor, cuts: list[tuple[int, int]], limit: int) -> list[Box]:
    """Return the boxes of spans of the tensor ``whole``."""
    found = []
    for start, end in cuts:
        for offset, sizes in split_span(tuple(whole.shape), start, end, limit):
            part = whole
            for dimension, (first, length) in enumerate(zip(offset, sizes, strict=True)):
                part = part.narrow(dimension, first, length)
            found.append(Box("x", tuple(whole.shape), offset, part))
    return found


@given(SHAPES, st.integers(1, 50), st.data())
def test_boxes_hold_the_span_in_order(shape, limit, data):
    whole = torch.arange(math.prod(shape)).view(shape)
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, whole.numel())] * 2)))
    found = boxes(whole, [(start, end)], limit)
    assert [x for box in found for x in box.data.flatten().tolist()] == list(range(start, end))
    assert all(1 <= box.data.numel() <= limit for box in found)


def test_boxes_are_few():
    """A span of a matrix is a part of a row, complete rows, and a part of a row, apart from size limits."""
    assert list(split_span((10, 100), 250, 730)) == [
        ((2, 50), (1, 50)),
        ((3, 0), (4, 100)),
        ((7, 0), (1, 30)),
    ]
    rows = MAX_ELEMENTS // 4096
    assert len(list(split_span((4 * rows, 4096), 0, 4 * rows * 4096))) == 4


@given(SHAPES, st.integers(1, 50), st.integers(1, 50), st.data())
def test_any_layout_reads_what_another_wrote(tmp_path_factory, shape, limit, other_limit, data):
    whole = torch.rand(shape)
    directory = tmp_path_factory.mktemp("boxes")
    written = write_file(directory / "__0_0.distcp", boxes(whole, runs(whole.numel(), data.draw), limit))
    index = index_of(directory, written)
    target = torch.zeros(shape)
    wanted = boxes(target, runs(whole.numel(), data.draw), other_limit)
    assert fill(index, wanted) == sum(w.piece.length for w in written)
    assert torch.equal(target, whole)
    assert torch.equal(read_tensor(index, "x"), whole)


def test_only_what_overlaps_is_read(tmp_path):
    whole = torch.rand(8, 4)
    index = index_of(tmp_path, write_file(tmp_path / "__0_0.distcp", boxes(whole, [(0, 32)], 8)))
    lengths = [piece.length for piece in index.entries["x"].pieces]
    assert len(lengths) == 4
    part = torch.zeros(1, 4)
    assert fill(index, [Box("x", (8, 4), (5, 0), part)]) == lengths[2]
    assert torch.equal(part, whole[5:6])


def test_padding_that_differs(tmp_path):
    """If a vocabulary is padded differently, missing rows are zero and extra rows are ignored."""
    whole = torch.rand(6, 4)
    index = index_of(tmp_path, write_file(tmp_path / "__0_0.distcp", cut("x", (6, 4), whole)))
    for rows in (5, 6, 9):
        target = torch.full((rows, 4), 7.0)
        fill(index, [Box("x", (rows, 4), (0, 0), target, padded=True)])
        both = min(rows, 6)
        assert torch.equal(target[:both], whole[:both]) and not target[both:].any()
    with pytest.raises(Damaged, match=r"x has shape \[6, 4\] in the checkpoint and \[9, 4\]"):
        fill(index, [Box("x", (9, 4), (0, 0), target)])


def test_missing_parts_are_damage(tmp_path):
    whole = torch.rand(8, 4)
    written = write_file(tmp_path / "__0_0.distcp", boxes(whole, [(0, 32)], 8))
    index = index_of(tmp_path, written[:-1])
    with pytest.raises(Damaged, match="parts of x are missing"):
        read_tensor(index, "x")
