"""Rank layouts that are refused, with the remedy in the error, and the placement of layers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mesh.config.layout import layout
from megatron_mesh.config.placement import Part, microbatch_group_size, placement, virtual_stages
from megatron_mesh.config.schema import ParallelConfig
from megatron_mesh.errors import UserError
from tests.helpers import tiny_config


def config(world_size: int, **changes: Any):
    values = {"layers": "4+8R2+4", "global_batch_size": 32, "micro_batch_size": 1, **changes}
    return tiny_config(world_size=world_size, **values)


REFUSED: list[tuple[int, dict[str, Any], list[str]]] = [
    (6, {"pipeline_model_parallel_size": 4}, ["= 4 does not divide", "processes, 6", "4 or 8"]),
    (3, {"pipeline_model_parallel_size": 4}, ["start 4 processes (torchrun"]),
    (
        2,
        {"context_parallel_size": 2, "transformer_impl": "local"},
        ["Transformer Engine's attention", "local"],
    ),
    (3, {"context_parallel_size": 2}, ["--context-parallel-size 2 = 2 does not divide", "2 or 4"]),
    (2, {"context_parallel_size": 2}, ["--context-parallel-size 2 needs --bf16"]),
    (2, {"context_parallel_size": 2, "seq_length": 18, "bf16": True}, ["into 4 pieces", "16 or 20"]),
    (
        4,
        {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "seq_length": 20, "bf16": True},
        ["into 8 pieces", "16 or 24"],
    ),
    (2, {"overlap_param_gather": True}, ["needs --use-distributed-optimizer"]),
    (
        2,
        {"overlap_param_gather": True, "use_distributed_optimizer": True},
        ["needs --overlap-grad-reduce"],
    ),
    (2, {"ddp_bucket_size": 1000}, ["--ddp-bucket-size needs --overlap-grad-reduce"]),
    (4, {"tensor_model_parallel_size": 4, "seq_length": 18}, ["--seq-length", "18", "size 3"]),
    (
        4,
        {"pipeline_model_parallel_size": 4, "global_batch_size": 3},
        ["at least 4 micro-batches", "only 3", "4 or more"],
    ),
    (
        4,
        {"pipeline_model_parallel_size": 4, "microbatch_group_size_per_virtual_stage": 3},
        ["from 4 to 32", "use 4, the nearest"],
    ),
    (
        4,
        {"pipeline_model_parallel_size": 4, "microbatch_group_size_per_virtual_stage": 15},
        ["must not be smaller than 4", "use 14, the nearest"],
    ),
    (4, {"pipeline_model_parallel_size": 4, "layers": "1+1R2+1"}, ["pipeline rank 1 would have no layers"]),
    (1, {"watchdog_timeout_minutes": 40.0}, ["must be below --distributed-timeout-minutes 30"]),
    (1, {"watchdog_timeout_minutes": 30.0}, ["must be below --distributed-timeout-minutes 30"]),
    (1, {"microbatch_group_size_per_virtual_stage": 2}, ["--pipeline-model-parallel-size above 1"]),
    (1, {"pipeline_model_parallel_layout": "4/8/4"}, ["--pipeline-model-parallel-size above 1"]),
    (
        2,
        {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
        ["for vanilla", "K+2"],
    ),
    (
        2,
        {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "2,2/4,4"},
        ["write prelude/core/coda", "2,2/4,4/3,1"],
    ),
    (
        2,
        {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "2,2/4,3/2,2"},
        ["gives the core the parts (4, 3)", "an even layout is 2,2/4,4/2,2"],
    ),
    (
        4,
        {
            "pipeline_model_parallel_size": 4,
            "recompute_granularity": "full",
            "recompute_num_layers": 2,
        },
        ["--recompute-num-layers 2", "1,1,1,1/2,2,2,2/1,1,1,1"],
    ),
    (
        2,
        {
            "recurrence": "vanilla",
            "layers": "6",
            "pipeline_model_parallel_size": 2,
            "num_virtual_stages_per_pipeline_rank": 2,
        },
        ["--layers 6", "4 or 8"],
    ),
    (
        2,
        {
            "recurrence": "vanilla",
            "layers": "6",
            "pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_layout": "1,1/2,2/0,0",
        },
        ["for looped models"],
    ),
]


@pytest.mark.parametrize(("world_size", "changes", "named"), REFUSED, ids=lambda value: str(value)[:70])
def test_errors_name_what_works(world_size: int, changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError) as error:
        config(world_size, **changes)
    for part in named:
        assert part in str(error.value)


def test_remedies_in_the_errors_work() -> None:
    config(8, pipeline_model_parallel_size=4)
    config(4, pipeline_model_parallel_size=4, global_batch_size=4)
    config(4, pipeline_model_parallel_size=4, microbatch_group_size_per_virtual_stage=14)


@given(
    ranks=st.integers(1, 9),
    layers=st.tuples(st.integers(0, 9), st.integers(1, 12), st.integers(0, 9)),
    weighed=st.booleans(),
)
def test_every_layer_is_on_one_rank(ranks: int, layers: tuple[int, int, int], weighed: bool) -> None:
    prelude, core, coda = layers
    model = tiny_config("mesh", f"{prelude}+{core}R2+{coda}").model
    parallel = ParallelConfig(
        pipeline_model_parallel_size=ranks,
        account_for_embedding_in_pipeline_split=weighed,
        account_for_loss_in_pipeline_split=weighed,
    )
    found = placement(model, parallel)
    parts = [found.part(rank) for rank in range(ranks)]
    whole = Part.whole(layout(model))
    for name in ("prelude", "core", "coda"):
        assert [n for part in parts for n in getattr(part, name)] == list(getattr(whole, name))
    assert [part.first for part in parts] == [True] + [False] * (ranks - 1)
    assert [part.last for part in parts] == [False] * (ranks - 1) + [True]
    if not weighed:
        for _, counts in found.sections():
            assert max(counts) - min(counts) <= 1
        held = [sum(counts) for counts in zip(found.prelude, found.core, found.coda, strict=True)]
        assert min(held) > 0 or sum(held) < ranks


def test_surplus_layers_are_far_from_embedding_and_loss() -> None:
    model = tiny_config("mesh", "5+11R2+5").model
    even = placement(model, ParallelConfig(pipeline_model_parallel_size=4))
    assert str(even) == "1,1,1,2/2,3,3,3/2,1,1,1"
    # The output projection has the FLOPs of more than one of these tiny layers.
    weighed = ParallelConfig(pipeline_model_parallel_size=4, account_for_loss_in_pipeline_split=True)
    assert placement(model, weighed).coda[-1] < even.coda[-1] + 1 and sum(placement(model, weighed).coda) == 5
    wide = tiny_config("mesh", "5+11R2+5", vocab_size=50304).model
    assert placement(wide, weighed).coda == (2, 2, 1, 0)


@pytest.mark.parametrize("ranks", range(1, 9))
def test_megatron_accepts_the_default_group_size(ranks: int) -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=ranks)
    for micro_batches in range(ranks, 40):
        group = microbatch_group_size(parallel, micro_batches)
        rest = micro_batches % group
        assert ranks <= group <= micro_batches and (rest == 0 or rest >= ranks)
        assert group == ranks or micro_batches % ranks


def test_virtual_stages() -> None:
    two = {"pipeline_model_parallel_size": 2}
    assert virtual_stages(config(1).model, ParallelConfig()) is None
    looped = config(2, **two)
    assert virtual_stages(looped.model, looped.parallel) == 4
    plain = config(2, recurrence="vanilla", layers="8", **two)
    assert virtual_stages(plain.model, plain.parallel) is None
    chunks = config(2, recurrence="vanilla", layers="8", num_virtual_stages_per_pipeline_rank=2, **two)
    assert virtual_stages(chunks.model, chunks.parallel) == 2
