"""Compiled kernels on a GPU: the cases of tests/unit/kernels, the widths of real models, and a whole MeSH."""

import pytest
import torch

from megatron_mesh import kernels
from megatron_mesh.recurrence.mixing import weighted_sum
from megatron_mesh.runtime import device
from tests.unit.kernels.cases import CASES, Case, check, evaluate, inputs_of, mesh_gradients, name_of

WIDE = [
    Case(129, width, terms, torch.bfloat16, batch=2)
    for width in (768, 1024, 2048, 2560, 4096, 8192)
    for terms in (2, 5)
]


@pytest.fixture(autouse=True, scope="module")
def _kernels_run() -> None:
    if reason := kernels.why_unavailable():
        pytest.skip(reason)


@pytest.mark.parametrize("case", [*CASES, *WIDE], ids=name_of)
def test_equals_the_sum_in_float64(case: Case) -> None:
    check(case, kernels.weighted_sum, where=device.device())


@pytest.mark.parametrize("loops", [1, 2, 3])
def test_a_whole_mesh_agrees(loops: int) -> None:
    calls, ours = mesh_gradients(kernels.weighted_sum, loops, 100, device.device())
    _, reference = mesh_gradients(weighted_sum, loops, 100, device.device())
    assert calls == loops + 1
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_results_are_deterministic() -> None:
    leaves, grad = inputs_of(Case(257, 2048, 4, torch.bfloat16))
    leaves = [x.detach().to(device.device()).requires_grad_() for x in leaves]
    first, second = (evaluate(kernels.weighted_sum, leaves, grad.to(device.device())) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_offsets_beyond_32_bits() -> None:
    """With more than 2^31 elements, a 32-bit offset can't reach the last row."""
    rows, width = 2**19 + 1, 4096
    states = [torch.zeros(rows, 1, width, dtype=torch.bfloat16, device=device.device()) for _ in range(2)]
    states[1][-1] = 3.0
    weights = torch.full((rows, 1, 2), 0.5, device=device.device())
    out = kernels.weighted_sum(weights, states)
    assert out[-1].eq(1.5).all() and out[:-1].eq(0).all()
