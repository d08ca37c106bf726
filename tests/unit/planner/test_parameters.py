"""Compare parameter formulas with real modules, for every pipeline rank and tensor-parallel size."""

import pytest
import torch

from megatron_mesh.config.placement import placement
from megatron_mesh.model.build import build_on_meta
from megatron_mesh.planner.costs import rank_parameters
from megatron_mesh.planner.plan import make_plan
from megatron_mesh.recurrence import SCHEMES
from tests.helpers import tiny_config

# Megatron-core only uses a given tensor-parallel group if torch.distributed is initialized.
pytestmark = pytest.mark.usefixtures("groups")


def counted(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_pipeline_rank(scheme: str, untied: bool, tp: int) -> None:
    config = tiny_config(scheme, "2+3R2+1", untie_embeddings_and_output_weights=untied)
    config.parallel.tensor_model_parallel_size = tp
    assert make_plan(config, tp).ranks[0].parameters == counted(build_on_meta(config))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("layout", [None, "2,0,0/1,1,1/0,0,1"])
@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize("scheme", ["base", "dynamic", "mesh", "vanilla+mesh"])
def test_every_rank_of_a_ring(scheme: str, untied: bool, layout: str | None, tp: int) -> None:
    config = tiny_config(scheme, "2+3R2+1", untie_embeddings_and_output_weights=untied)
    config.parallel.tensor_model_parallel_size = tp
    config.parallel.pipeline_model_parallel_size = 3
    config.parallel.pipeline_model_parallel_layout = layout
    parts = placement(config.model, config.parallel)
    stages = make_plan(config, 3 * tp).pipeline
    for rank in range(3):
        # The first rank counts as the first virtual stage, the others as the last.
        model = build_on_meta(
            config,
            pp_rank=rank,
            part=parts.part(rank),
            vp_stage=0 if rank == 0 else stages.chunks_per_rank - 1,
        )
        assert rank_parameters(config, stages, rank) == counted(model), rank
