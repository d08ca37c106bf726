"""Compare the planner's order and messages with those of Megatron-core's real schedules."""

from typing import Any

import pytest

from megatron_mesh.planner.plan import make_plan
from megatron_mesh.planner.schedule import Step, rank_order
from tests.helpers import tiny_config
from tests.unit.planner.recorded import recorded

INTERLEAVED = [
    # ranks, chunks, micro-batches, group
    (2, 3, 4, 2),
    (2, 4, 5, 3),
    (2, 4, 7, 7),
    (3, 4, 7, 4),
    (4, 4, 8, 4),
    (4, 5, 4, 4),
    (4, 3, 9, 5),
]


# Megatron-core only asks a group for its rank if torch.distributed is initialized.
pytestmark = pytest.mark.usefixtures("groups")


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("ranks,chunks,micro_batches,group", INTERLEAVED)
def test_interleaved_order_is_megatrons(
    ranks: int, chunks: int, micro_batches: int, group: int, overlap: bool
) -> None:
    for rank in range(ranks):
        real, _ = recorded(ranks, rank, chunks, micro_batches, group, overlap)
        assert len(real) == 2 * chunks * micro_batches
        assert rank_order(ranks, rank, chunks, micro_batches, group) == real


@pytest.mark.parametrize("ranks,micro_batches", [(1, 3), (2, 1), (3, 5), (4, 2)])
def test_plain_order_is_megatrons(ranks: int, micro_batches: int) -> None:
    for rank in range(ranks):
        real, _ = recorded(ranks, rank, 1, micro_batches, None)
        assert rank_order(ranks, rank, 1, micro_batches, None) == real


def test_the_first_steps_of_a_ring() -> None:
    """By hand: two ranks, three passes, four micro-batches in groups of two, so four warm-up forwards."""
    steps = rank_order(2, 1, 3, 4, 2)[:7]
    assert [(step.chunk, step.micro_batch) for step in steps[:5]] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert steps[5] == Step(backward=True, chunk=2, micro_batch=0)
    assert steps[6] == Step(backward=False, chunk=2, micro_batch=1)


@pytest.mark.parametrize("scheme,layers", [("base", "3+3R2+3"), ("vanilla", "12")])
def test_pipeline_bytes(scheme: str, layers: str) -> None:
    """Each message is a state of S*B*H elements, or of S/TP*B*H with sequence parallelism."""
    settings: dict[str, Any] = {"pipeline_model_parallel_size": 3, "global_batch_size": 12}
    if scheme == "vanilla":
        settings["num_virtual_stages_per_pipeline_rank"] = 4
    config = tiny_config(scheme, layers, world_size=3, **settings)
    shards = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    sharded = tiny_config(scheme, layers, world_size=6, **settings, **shards)
    plan, half = make_plan(config, 3), make_plan(sharded, 6)
    state = 16 * 2 * 32 * 4
    for rank in range(3):
        _, sent = recorded(3, rank, 4, 6, 3)
        traffic = plan.ranks[rank].traffic
        assert traffic.p2p_forward == sent["forward"] * state
        assert traffic.p2p_backward == sent["backward"] * state
        assert half.ranks[rank].traffic.p2p_forward * 2 == traffic.p2p_forward
