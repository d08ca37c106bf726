"""Check the estimated cost of a save by hand; tests/parallel/test_counts.py compares it with the disk."""

import pytest

from megatron_mesh.planner.plan import make_plan
from megatron_mesh.planner.rank_memory import BUFFER, Disk, Saving, save_seconds
from megatron_mesh.planner.text import saving_rows
from tests.helpers import tiny_config


@pytest.mark.parametrize(("bf16", "size"), [(False, 12), (True, 14)])
@pytest.mark.parametrize("sharded", [False, True])
def test_replicas_divide_the_parameters(sharded: bool, bf16: bool, size: int) -> None:
    config = tiny_config(bf16=bf16, use_distributed_optimizer=sharded, micro_batch_size=1, world_size=4)
    (rank,) = make_plan(config, 4).ranks
    assert rank.saving.total == size * rank.parameters
    assert rank.saving.largest == -(-size * rank.parameters // 4)


def test_replicated_parameters_are_written_once() -> None:
    """Tensor-parallel rank 0 writes them, so that all ranks together write the whole model once."""
    one = make_plan(tiny_config(), 1).ranks[0]
    two = make_plan(tiny_config(tensor_model_parallel_size=2, world_size=2), 2).ranks[0]
    assert two.saving.total == one.saving.total == 12 * one.parameters
    assert two.saving.largest == 12 * two.parameters > two.saving.total / 2


def test_the_slower_of_file_system_and_rank_decides() -> None:
    even = [Saving(largest=10**9, total=8 * 10**9)] * 2
    assert save_seconds(even, Disk(gb_per_s=4, rank_gb_per_s=1)) == 4
    assert save_seconds(even, Disk(gb_per_s=400, rank_gb_per_s=0.5)) == 2


def test_text() -> None:
    plan = make_plan(tiny_config(bf16=True, world_size=2, micro_batch_size=1), 2)
    saving = plan.ranks[0].saving
    assert saving.host_memory(background=False) == BUFFER == 2**23
    assert saving.host_memory(background=True) == BUFFER + saving.largest
    rows = dict(saving_rows(plan, Disk(gb_per_s=2), 8))
    assert "at 2 GB/s" in rows["  time to save"]
    assert "per host with 2 ranks" in rows["  host memory"]  # the whole run has only two
