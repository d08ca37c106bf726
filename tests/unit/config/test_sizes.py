"""Test the formulas for sizes; tests/unit/model/test_counts.py compares them with real modules."""

import subprocess
import sys

import pytest

from megatron_mesh.config import sizes
from megatron_mesh.config.layout import layout
from megatron_mesh.recurrence import SCHEMES
from tests.helpers import tiny_config


@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_flops_of_layers_and_passes_add_up(scheme: str, loops: int) -> None:
    model = tiny_config(scheme, f"1+2R{loops}+1").model
    passes = sum(sizes.enter_flops(model, index) for index in range(loops + 2))
    layers = layout(model).depth * sizes.layer_flops(model)
    assert layers + passes + sizes.head_flops(model) == sizes.forward_flops_per_token(model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensor_parallel_ranks_hold_the_whole_layer(scheme: str) -> None:
    model = tiny_config(scheme).model
    replicated = sizes.replicated_layer_parameters(model)
    sharded = sizes.layer_parameters(model, 2) - replicated
    assert 2 * sharded + replicated == sizes.layer_parameters(model)


def test_no_heavy_imports() -> None:
    """Importing the formulas loads neither Megatron-core nor Triton nor Transformer Engine."""
    code = (
        "import sys, megatron_mesh.config.sizes;"
        "print({name.split('.')[0] for name in sys.modules} & {'megatron', 'triton', 'transformer_engine'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
