"""Test the kernels in Triton's interpreter: compared with float64, and inside a whole MeSH."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mesh import kernels
from megatron_mesh.model import build_on_meta
from megatron_mesh.recurrence.mixing import weighted_sum
from tests.helpers import tiny_config
from tests.unit.kernels.cases import (
    CASES,
    Case,
    by_definition,
    check,
    check_kernels,
    inputs_of,
    mesh_gradients,
    name_of,
)

Run = Callable[..., Any]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_equals_float64(case: Case, interpreter: Run) -> None:
    interpreter(check_kernels, case)


@pytest.mark.parametrize("loops,hidden", [(1, 24), (2, 100), (3, 24)])
def test_a_whole_mesh_is_the_same(loops: int, hidden: int, interpreter: Run) -> None:
    calls, ours = interpreter(mesh_gradients, kernels.weighted_sum, loops, hidden)
    _, reference = mesh_gradients(weighted_sum, loops, hidden)
    assert calls == loops + 1
    for a, b in zip(ours, reference, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * b.abs().max().item())


def odd_layouts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Use a state twice, non-contiguous rows and weights, and a gradient of stride 0."""
    generator = torch.Generator().manual_seed(1)
    stored = torch.randn(3, 7, 40, generator=generator, requires_grad=True)
    weights = torch.randn(3, generator=generator, requires_grad=True)
    x, y = stored.transpose(0, 1), stored.transpose(0, 1)[..., ::2]
    found = kernels.weighted_sum(weights.expand(7, 3, 3), [y, y, x[..., :20]])
    expected = by_definition(weights.expand(7, 3, 3), [y, y, x[..., :20]])
    ours = torch.autograd.grad(found.sum(), [weights, stored])
    reference = torch.autograd.grad(expected.sum(), [weights, stored])
    return ours, reference


def test_odd_layouts(interpreter: Run) -> None:
    for a, b in zip(*interpreter(odd_layouts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def second_derivative() -> None:
    leaves, grad = inputs_of(Case(3, 8, 2, torch.float32))
    out = kernels.weighted_sum(leaves[0], leaves[1:])
    (first,) = torch.autograd.grad(out, [leaves[0]], grad.requires_grad_(), create_graph=True)
    first.sum().backward()


def test_a_second_derivative_is_an_error(interpreter: Run) -> None:
    with pytest.raises(RuntimeError, match="once_differentiable"):
        interpreter(second_derivative)


def test_float64_and_empty_tensors_need_no_kernel() -> None:
    generator = torch.Generator().manual_seed(3)
    weights, *states = (
        torch.randn(3, 2, n, generator=generator, dtype=torch.float64, requires_grad=True) for n in (2, 4, 4)
    )
    assert torch.autograd.gradcheck(lambda w, *xs: kernels.weighted_sum(w, xs), (weights, *states))
    nothing = torch.zeros(0, 2, 4, requires_grad=True)
    out = kernels.weighted_sum(torch.zeros(0, 2, 1), [nothing])
    out.sum().backward()
    assert out.shape == nothing.grad.shape == (0, 2, 4)


def test_mismatched_shapes_never_reach_a_kernel() -> None:
    states = [torch.zeros(3, 2, 4), torch.zeros(3, 2, 4)]
    for weights, given in (
        (torch.zeros(3, 2, 3), states),
        (torch.zeros(1, 1, 2), states),
        (torch.zeros(3, 2, 2), [states[0], torch.zeros(3, 2, 5)]),
    ):
        with pytest.raises(AssertionError):
            kernels.weighted_sum(weights, given)


def _drops_a_term(weights: Tensor, states: Sequence[Tensor]) -> Tensor:
    return weighted_sum(torch.cat([weights[..., :-1], 0 * weights[..., -1:]], dim=-1), states)


def _adds_in_low_precision(weights: Tensor, states: Sequence[Tensor]) -> Tensor:
    total = weights[..., :1].to(states[0].dtype) * states[0]
    for j, state in enumerate(states[1:], start=1):
        total = total + weights[..., j : j + 1].to(state.dtype) * state
    return total


def _misses_the_last_column(weights: Tensor, states: Sequence[Tensor]) -> Tensor:
    out = weighted_sum(weights, states)
    return torch.cat([out[..., :-1], out[..., -1:].detach()], dim=-1)


def _shifts_weights_by_a_row(weights: Tensor, states: Sequence[Tensor]) -> Tensor:
    return weighted_sum(weights.roll(1, dims=1), states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_check_finds_planted_errors(dtype: torch.dtype) -> None:
    case = Case(7, 100, 3, dtype)
    check(case, weighted_sum)
    wrong = [_drops_a_term, _misses_the_last_column, _shifts_weights_by_a_row]
    for mix in wrong if dtype == torch.float32 else [*wrong, _adds_in_low_precision]:
        with pytest.raises(AssertionError, match="not close"):
            check(case, mix, roundings=1.0)


@pytest.mark.parametrize("scheme", ["mesh", "dynamic"])
def test_models_use_the_kernels_if_they_are_available(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    assert build_on_meta(tiny_config(scheme)).decoder.recurrence.mix is weighted_sum
    monkeypatch.setattr(kernels, "available", lambda: True)
    assert build_on_meta(tiny_config(scheme)).decoder.recurrence.mix is kernels.weighted_sum
