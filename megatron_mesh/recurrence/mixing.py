"""The memory's one heavy operation: a weighted sum of states, with a weight per token and state."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Mix = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""Any implementation of ``weighted_sum``."""


def at_least_fp32(x: Tensor) -> Tensor:
    """Convert ``x`` to float32, unless its dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _plain_sum(weights_SBJ: Tensor, states_SBH: Sequence[Tensor]) -> Tensor:
    total = weights_SBJ[..., :1] * at_least_fp32(states_SBH[0])
    for j, state in enumerate(states_SBH[1:], start=1):
        total = torch.addcmul(total, weights_SBJ[..., j : j + 1], state.to(total.dtype))
    return total.to(states_SBH[0].dtype)


def _stacked_sum(weights_SBJ: Tensor, states_SBH: Sequence[Tensor]) -> Tensor:
    """Compute ``_plain_sum`` as a matrix product, for compiled inference.

    torch 2.13's inductor may fuse ``_plain_sum`` into a kernel that runs before an operator that writes one
    of the states in place, such as vLLM's linear layers on CPUs. The result is then wrong, without an error.
    Inductor doesn't fuse a matrix product.
    """
    states_SBJH = torch.stack([state.to(weights_SBJ.dtype) for state in states_SBH], dim=-2)
    return (weights_SBJ.unsqueeze(-2) @ states_SBJH).squeeze(-2).to(states_SBH[0].dtype)


class _WeightedSum(torch.autograd.Function):
    """Saves only the states and the weights for backward.

    With ``*`` and ``+`` under autograd, each operation would run a kernel and make a temporary [S, B, H],
    both forward and backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        return _plain_sum(tensors[0], tensors[1:])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        weights, *states = ctx.saved_tensors
        grad = grad.to(weights.dtype)
        need_weights, *need_state = ctx.needs_input_grad
        grad_weights = None
        if need_weights:
            dots = [(grad * state).sum(-1) for state in states]
            grad_weights = torch.stack(dots, dim=-1)
        grad_states = [
            (weights[..., j : j + 1] * grad).to(state.dtype) if need else None
            for j, (state, need) in enumerate(zip(states, need_state, strict=True))
        ]
        return grad_weights, *grad_states


def weighted_sum(weights_SBJ: Tensor, states_SBH: Sequence[Tensor]) -> Tensor:
    """Return ``sum_j weights[..., j] * states[j]``, accumulated in at least float32.

    Args:
        weights_SBJ: [S, B, J], float32 or wider.
        states_SBH: J tensors [S, B, H] of one dtype, which is also the dtype of the result.
    """
    # A trace can't contain a custom autograd function. Compilers fuse the plain sum themselves, and
    # torch.compile rejects a custom function that gets the same tensor twice, which happens in a model
    # without a prelude.
    compiling = torch.compiler.is_compiling()
    if torch.is_grad_enabled() and not (compiling or torch.jit.is_tracing()):
        return _WeightedSum.apply(weights_SBJ, *states_SBH)
    if compiling and not torch.is_grad_enabled():
        return _stacked_sum(weights_SBJ, states_SBH)
    return _plain_sum(weights_SBJ, states_SBH)
