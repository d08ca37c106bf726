"""Test what the ring guarantees besides equal results: one owner per weight, one hidden state per message."""

import numpy as np
import pytest

from megatron_mesh.recurrence import SCHEMES
from tests.parallel.layouts import LAYOUTS, model_of
from tests.parallel.observe import elements_sent, initial_weights, unaligned_gradients
from tests.parallel.pool import pool


@pytest.mark.parametrize("layout", ["tp2", "pp4", "tp2-pp2"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_seed_gives_the_same_model_on_every_layout(layout: str, tied: bool) -> None:
    model = model_of("mesh", 2, tied)
    one = {name: weight for name, (weight, *_) in pool(1).run(initial_weights, model)[0].items()}
    processes, settings = LAYOUTS[layout]
    ranks = pool(processes).run(initial_weights, {**model, **settings})
    assert set().union(*ranks) == set(one)
    size = settings.get("tensor_model_parallel_size", 1)
    for rank in ranks:
        for name, (weight, dimension, index) in rank.items():
            whole = one[name]
            mine = whole if dimension is None else np.split(whole, size, dimension)[index]
            np.testing.assert_array_equal(weight, mine, err_msg=name)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "vanilla"])
def test_one_hidden_state_crosses_for_every_scheme(scheme: str) -> None:
    _check_traffic(model_of(scheme, 2, tied=False), "pp2", ranks=2, passes=4)


@pytest.mark.parametrize(
    ("layout", "loops", "ranks"), [("pp4", 3, 4), ("tp2-sp-pp2", 2, 2), ("tp2-pp2", 1, 2)]
)
def test_one_hidden_state_crosses_on_every_layout(layout: str, loops: int, ranks: int) -> None:
    _check_traffic(model_of("mesh", loops, tied=False), layout, ranks, passes=loops + 2)


def _check_traffic(model: dict, layout: str, ranks: int, passes: int) -> None:
    """Count S * B * H elements (per sequence shard) for each boundary, pass, micro-batch and direction."""
    processes, settings = LAYOUTS[layout]
    sequence, hidden, batch = 16, 32, 8  # the batch of all micro-batches together
    shards = settings.get("tensor_model_parallel_size", 1) if settings.get("sequence_parallel") else 1
    state = sequence * hidden * batch // shards
    for rank in pool(processes).run(elements_sent, {**model, **settings}):
        last, first = rank["rank"] == ranks - 1, rank["rank"] == 0
        assert rank["forward"] == state * (passes - last)
        assert rank["backward"] == state * (passes - first)
        assert rank["received forward"] == state * (passes - first)
        assert rank["received backward"] == state * (passes - last)


def test_every_weight_has_one_owner() -> None:
    model = model_of("mesh", 2, tied=False)
    (whole,) = pool(1).run(initial_weights, model)
    parts = pool(4).run(initial_weights, {**model, **LAYOUTS["pp4"][1]})
    homes = [name for part in parts for name in part]
    assert sorted(homes) == sorted(whole)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layout", ["one", "pp2"])
def test_gradients_of_matrices_are_aligned(scheme: str, layout: str) -> None:
    processes, settings = (1, {}) if layout == "one" else LAYOUTS[layout]
    for tied in (False, True):
        for rank in pool(processes).run(unaligned_gradients, {**model_of(scheme, 2, tied), **settings}):
            matrices, unaligned = rank
            assert matrices > 2 and not unaligned
