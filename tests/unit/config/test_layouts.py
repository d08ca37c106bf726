import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mesh.config.layout import LayerLayout, parse_layers
from megatron_mesh.errors import UserError


@pytest.mark.parametrize(
    ("text", "layout", "depth", "unique"),
    [
        ("4+8R2+4", LayerLayout(4, 8, 2, 4), 24, 16),
        ("3+6R3+3", LayerLayout(3, 6, 3, 3), 24, 12),
        (" 0+1R1+0 ", LayerLayout(0, 1, 1, 0), 1, 1),
        ("4+8+8+4", LayerLayout(4, 8, 2, 4, shared=False), 24, 24),
        ("4+8+4", LayerLayout(4, 8, 1, 4, shared=False), 16, 16),
        ("24", LayerLayout(0, 24, 1, 0, shared=False), 24, 24),
    ],
)
def test_the_three_forms(text: str, layout: LayerLayout, depth: int, unique: int) -> None:
    assert parse_layers(text) == layout
    assert (layout.depth, layout.unique_layers) == (depth, unique)
    assert str(layout) == text.strip()


_count = st.integers(0, 9)
_positive = st.integers(1, 9)


@given(st.builds(LayerLayout, _count, _positive, _positive, _count, st.booleans()))
def test_parsing_inverts_str(layout: LayerLayout) -> None:
    assert parse_layers(str(layout)) == layout


def test_distinct_keeps_the_depth() -> None:
    distinct = parse_layers("4+8R2+4").distinct()
    assert str(distinct) == "4+8+8+4"
    assert distinct.depth == distinct.unique_layers == 24


def test_unrolled_is_the_plain_model_of_the_same_depth() -> None:
    unrolled = parse_layers("4+8R2+4").unrolled()
    assert unrolled.plain
    assert str(unrolled) == "24"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("4+8R0+4", "at least 1"),
        ("4+0R2+4", "--core-layers must be at least 1"),
        ("0", "--core-layers must be at least 1"),
        ("4+8", "two numbers"),
        ("4+8+7+4", "cores of different sizes [8, 7]"),
        ("4x8", "is not a layer layout"),
        ("", "is not a layer layout"),
        ("4+8R2", "is not a layer layout"),
        ("-1+8R2+4", "is not a layer layout"),
    ],
)
def test_bad_layouts(text: str, named: str) -> None:
    with pytest.raises(UserError) as error:
        parse_layers(text)
    assert named in str(error.value)
