"""Compare the memory that the planner adds for FP8 with the matrices of real models."""

import pytest

from megatron_mesh.model import build_on_meta
from megatron_mesh.planner.plan import make_plan
from tests.helpers import tiny_config

SIZES = {"hidden_size": 64, "bf16": True, "seq_length": 32}
FP8 = {"fp8_format": "hybrid"}


def matrices(layers: str, recurrence: str, part: str) -> int:
    """Count the weights of all matrices whose name contains ``part``."""
    model = build_on_meta(tiny_config(recurrence, layers, **SIZES))
    return sum(p.numel() for name, p in model.named_parameters() if part in name and p.dim() == 2)


def memory(recurrence: str, layers: str, ranks: int = 1, **settings):
    if ranks > 1:
        settings |= {"pipeline_model_parallel_size": ranks}
    config = tiny_config(recurrence, layers, world_size=ranks, **SIZES, **settings)
    return [rank.memory for rank in make_plan(config, ranks).ranks]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "recurrence,layers,scope,part",
    [
        ("mesh", "2+2R2+2", "core", ".core."),
        ("mesh", "2+2R3+2", "all", ".layers."),
        ("base", "2+2R3+2", "core", ".core."),
        ("vanilla+mesh", "2+2+2+2", "core", ".core"),
        ("vanilla", "4", "core", ".layers."),
    ],
)
def test_cached_casts_take_two_bytes_per_fp8_weight(ranks, recurrence, layers, scope, part) -> None:
    plain = memory(recurrence, layers, ranks)
    cast = memory(recurrence, layers, ranks, **FP8, fp8_scope=scope)
    added = sum(a.weights - b.weights for a, b in zip(cast, plain, strict=True))
    assert added == 2 * matrices(layers, recurrence, part) > 0
    for a, b in zip(cast, plain, strict=True):
        assert (a.gradients, a.optimizer, a.activations) == (b.gradients, b.optimizer, b.activations)


def test_weights_stored_in_fp8_take_as_much_as_in_bfloat16() -> None:
    sharded = {"use_distributed_optimizer": True}
    plain = memory("mesh", "2+2R2+2", **sharded)
    assert memory("mesh", "2+2R2+2", **FP8, **sharded, fp8_param_gather=True) == plain


@pytest.mark.parametrize("recipe", ["blockwise", "delayed"])
def test_per_pass_casts_live_as_long_as_the_activations(recipe) -> None:
    (plain,), (cast,) = (memory("mesh", "2+2R3+2", **s) for s in ({}, {**FP8, "fp8_recipe": recipe}))
    assert cast.weights == plain.weights
    assert cast.activations - plain.activations == 3 * 2 * matrices("2+2R3+2", "mesh", ".core.")


def test_recomputation_recreates_the_casts_of_one_layer_at_a_time() -> None:
    full = {"recompute_granularity": "full"}
    fp8 = {**FP8, "fp8_recipe": "blockwise"}
    (plain,), (cast,) = (memory("mesh", "2+2R3+2", **full, **s) for s in ({}, fp8))
    assert cast.activations - plain.activations == matrices("2+2R3+2", "mesh", ".core.")  # 2 bytes, 1 of 2
