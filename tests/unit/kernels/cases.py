"""Cases with expected results for testing the kernels, in Triton's interpreter and on a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mesh import kernels
from megatron_mesh.recurrence import LoopState, RecurrenceOptions, build_scheme

Mix = Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Case:
    """Shapes and type of a weighted sum, and which of (weights, *states) get no gradient."""

    sequence: int
    hidden: int
    terms: int
    dtype: torch.dtype
    batch: int = 3
    detached: tuple[int, ...] = ()


# Either one row more than a program has, or several programs of which the last is partly filled.
SEQUENCES = {1: 683, 24: 23, 100: 7, 128: 7, 768: 5}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    *(Case(s, h, j, dtype) for h, s in SEQUENCES.items() for j in (2, 3, 4, 5) for dtype in DTYPES),
    Case(7, 100, 1, torch.float32),
    Case(5, 24, 8, torch.bfloat16),
    Case(1, 8193, 3, torch.float32, batch=1),  # wider than a program's columns
    Case(3, 20000, 2, torch.bfloat16, batch=1),
    Case(7, 100, 3, torch.float32, detached=(1,)),  # a frozen embedding
    Case(7, 100, 3, torch.float32, detached=(0,)),
    Case(7, 100, 3, torch.float32, detached=(0, 2, 3)),
    Case(7, 100, 3, torch.float32, detached=(1, 2, 3)),
]


def name_of(case: Case) -> str:
    """Name a case, for test ids."""
    without = "".join(f"-without{i}" for i in case.detached)
    return f"H{case.hidden}-J{case.terms}-{str(case.dtype).removeprefix('torch.')}{without}"


def inputs_of(case: Case) -> tuple[list[Tensor], Tensor]:
    """Draw (weights, *states) as leaves, and the gradient of the result."""
    generator = torch.Generator().manual_seed(case.hidden * 10 + case.terms)
    shape = (case.sequence, case.batch, case.hidden)
    weights = torch.randn(*shape[:2], case.terms, generator=generator)
    states = [torch.randn(shape, generator=generator).to(case.dtype) for _ in range(case.terms)]
    leaves = [x.requires_grad_(i not in case.detached) for i, x in enumerate([weights, *states])]
    return leaves, torch.randn(shape, generator=generator).to(case.dtype)


def evaluate(mix: Mix, leaves: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Return the result and the gradients of the leaves that require one."""
    out = mix(leaves[0], list(leaves[1:]))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def by_definition(weights: Tensor, states: Sequence[Tensor]) -> Tensor:
    """Compute the sum in the most obvious way."""
    return torch.einsum("sbj,jsbh->sbh", weights, torch.stack(list(states)))


def check(case: Case, mix: Mix, *, where: torch.device | str = "cpu", roundings: float = 0.5) -> None:
    """Raise AssertionError unless ``mix`` equals the float64 result up to rounding.

    Args:
        roundings: tolerance for states and their gradients, in units in the last place: 0.5 with rounding to
            nearest, 1 in Triton's interpreter, which truncates bfloat16.
    """
    leaves, grad = inputs_of(case)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
    expected = evaluate(by_definition, exact, grad.double())
    there = [x.detach().to(where).requires_grad_(x.requires_grad) for x in leaves]
    found = evaluate(mix, there, grad.to(where))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    for ours, reference, like in zip(found, expected, [leaves[1], *wanted], strict=True):
        assert ours.dtype == like.dtype and ours.shape == like.shape
        of_fp32 = 2e-6 * case.hidden**0.5 if like is leaves[0] else 2e-6
        eps = torch.finfo(like.dtype).eps if like.dtype != torch.float32 else 0.0
        rtol = 1.01 * roundings * eps
        torch.testing.assert_close(ours.cpu().double(), reference, rtol=rtol, atol=of_fp32)


def check_kernels(case: Case) -> None:
    """Run ``check`` in Triton's interpreter."""
    check(case, kernels.weighted_sum, roundings=1.0)


def mesh_gradients(
    mix: Mix, loops: int, hidden: int, where: torch.device | str = "cpu"
) -> tuple[int, list[Tensor]]:
    """Run a whole MeSH around a simple core; return the calls of ``mix``, the output and all gradients."""
    generator = torch.Generator().manual_seed(loops)
    scheme = build_scheme("mesh", hidden, loops, RecurrenceOptions(slots=loops + 3))
    for parameter in scheme.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    h_emb = torch.randn(5, 3, hidden, generator=generator)
    core = torch.randn(hidden, hidden, generator=generator) / hidden**0.5
    scheme, h_emb, core = scheme.to(where), h_emb.to(where), core.to(where)
    calls = 0

    def counted(weights: Tensor, states: Sequence[Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return mix(weights, states)

    scheme.mix = counted
    leaves = [h_emb.requires_grad_(), core.requires_grad_(), *scheme.parameters()]
    state, x = LoopState(), h_emb
    for index in range(loops + 2):
        x = torch.tanh(scheme(index, x, state) @ core)
    return calls, [x.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(x.pow(2).sum(), leaves))]
