"""Check simulated time lines by hand, with the closed formula, and for every dependency."""

from itertools import pairwise

import pytest

from megatron_mesh.config.schema import Config
from megatron_mesh.config.sizes import flops_per_token
from megatron_mesh.planner.costs import Cost, chunk_costs
from megatron_mesh.planner.plan import make_plan
from megatron_mesh.planner.schedule import Timeline, schedule_order, simulate
from megatron_mesh.planner.stages import Chunk, Pipeline
from megatron_mesh.planner.suggest import balanced_placement
from tests.helpers import tiny_config


def timeline(passes: list[list[float]], micro_batches: int, transfer: float = 0.0) -> Timeline:
    """Simulate ``passes``, the forward cost [pass][rank]; a backward costs twice as much."""
    ranks = len(passes[0])
    chunks = tuple(tuple(Chunk("", (1,)) for _ in passes) for _ in range(ranks))
    group = ranks if len(passes) > 1 else None
    stages = Pipeline(chunks, (1,) * ranks, micro_batches, group)
    costs = [[Cost(p[rank], 2 * p[rank]) for p in passes] for rank in range(ranks)]
    return simulate(schedule_order(stages), costs, transfer)


def test_two_ranks_by_hand() -> None:
    """Rank 0: F1 0-1, F2 1-2, B1 4-6, B2 7-9. Rank 1: F1 1-2, B1 2-4, F2 4-5, B2 5-7."""
    times = timeline([[1.0, 1.0]], micro_batches=2)
    assert [(s.start, s.end) for s in times.spans[0]] == [(0, 1), (1, 2), (4, 6), (7, 9)]
    assert [(s.start, s.end) for s in times.spans[1]] == [(1, 2), (2, 4), (4, 5), (5, 7)]
    assert times.step_time == 9 and times.busy == (6, 6)
    assert times.bubble_share == pytest.approx(1 - 12 / 18)
    assert timeline([[1.0, 1.0]], micro_batches=1, transfer=0.5).step_time == 1 + 0.5 + 1 + 2 + 0.5 + 2


@pytest.mark.parametrize("ranks,passes,micro_batches", [(2, 3, 2), (4, 4, 8), (4, 5, 64), (8, 4, 16)])
def test_equal_passes_have_the_formulas_bubble(ranks: int, passes: int, micro_batches: int) -> None:
    times = timeline([[1.0] * ranks] * passes, micro_batches)
    assert times.bubble_over_compute == pytest.approx((ranks - 1) / (passes * micro_batches))
    plain = timeline([[1.0] * ranks], micro_batches)
    assert plain.bubble_over_compute == pytest.approx((ranks - 1) / micro_batches)
    assert times.imbalance == pytest.approx(0)


@pytest.mark.parametrize(
    "passes,micro_batches,percent",
    [
        ((4, 8, 8, 4), 16, 7.29),  # the formula: 4.69
        ((4, 8, 8, 4), 64, 2.86),  # 1.17
        ((5, 11, 11, 5), 64, 4.05),  # 1.17, if layers could be cut in quarters
    ],
)
def test_unequal_passes_wait_longer(passes: tuple[int, ...], micro_batches: int, percent: float) -> None:
    """Four ranks with a quarter of each pass, and no output projection."""
    times = timeline([[layers / 4] * 4 for layers in passes], micro_batches)
    assert 100 * times.bubble_over_compute == pytest.approx(percent, abs=0.01)
    assert times.bubble_over_compute > 3 / (4 * micro_batches)


@pytest.mark.parametrize("transfer", [0.0, 0.25])
def test_every_input_arrives_before_it_is_used(transfer: float) -> None:
    ranks, passes = 3, 4
    costs = [[1.0, 0.5, 2.0], [3.0, 2.0, 2.0], [3.0, 2.0, 2.0], [0.5, 1.0, 2.5]]
    times = timeline(costs, micro_batches=7, transfer=transfer)
    forward, backward = {}, {}
    for rank, spans in enumerate(times.spans):
        for before, after in pairwise(spans):
            assert before.end <= after.start
        for span in spans:
            # The position in the network: chunk by chunk, rank by rank.
            place = span.step.chunk * ranks + rank, span.step.micro_batch
            (backward if span.step.backward else forward)[place] = span
    assert len(forward) == len(backward) == ranks * passes * 7
    for (place, micro_batch), span in forward.items():
        if place:
            assert span.start >= forward[place - 1, micro_batch].end + transfer
    for (place, micro_batch), span in backward.items():
        if place + 1 < ranks * passes:
            assert span.start >= backward[place + 1, micro_batch].end + transfer
        else:
            assert span.start >= forward[place, micro_batch].end


def test_costs_add_up_to_the_models_flops() -> None:
    """Over ranks and chunks they add up to the whole model's; full recomputation repeats all layers."""
    for recompute in (None, "full"):
        config = tiny_config("mesh", "2+3R2+2", recompute_granularity=recompute)
        tokens = config.training.micro_batch_size * config.model.seq_length
        whole = chunk_costs(config, make_plan(config, 1).pipeline)[0][0]
        config.parallel.pipeline_model_parallel_size = 2
        split = [cost for rank in chunk_costs(config, make_plan(config, 2).pipeline) for cost in rank]
        assert whole.forward == pytest.approx(sum(cost.forward for cost in split))
        assert whole.backward == pytest.approx(sum(cost.backward for cost in split))
        if recompute is None:
            assert sum(whole) == pytest.approx(tokens * flops_per_token(config.model))
        else:
            h, vocabulary = config.model.hidden_size, 128
            assert whole.backward - 2 * whole.forward == pytest.approx(
                whole.forward - tokens * (2 * h * vocabulary + _mesh_flops(config)), rel=1e-6
            )


def _mesh_flops(config: Config) -> int:
    """Per token: K + 1 = 3 cycles with 2 routers H x N each, and weighted sums of 2, 3 and 4 states."""
    h, slots = config.model.hidden_size, config.model.mesh_slots
    return 3 * 2 * 2 * h * slots + 2 * h * (2 + 3 + 4)


def test_a_searched_placement_waits_less() -> None:
    """6.9B on four ranks: four divides no section, and the output projection costs as much as a layer."""
    config = tiny_config("mesh", "5+11R2+5", hidden_size=4096, seq_length=4096, vocab_size=50277)
    config.training.global_batch_size = 64
    config.parallel.pipeline_model_parallel_size = 4
    even = make_plan(config, 4)
    parts = balanced_placement(config.model, 4)
    assert (sum(parts.prelude), sum(parts.core), sum(parts.coda)) == (5, 11, 5)
    config.parallel.pipeline_model_parallel_layout = str(parts)
    searched = make_plan(config, 4)
    assert searched.timeline.bubble_share < 0.7 * even.timeline.bubble_share
