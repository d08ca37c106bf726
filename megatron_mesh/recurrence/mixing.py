"""A weighted sum of states with a weight per token: the one heavy operation of the memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Mix = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""What ``weighted_sum`` does, by whatever means."""


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in float32, or in its own type where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _plain_sum(weights_SBJ: Tensor, states_SBH: Sequence[Tensor]) -> Tensor:
    total = weights_SBJ[..., :1] * at_least_fp32(states_SBH[0])
    for j, state in enumerate(states_SBH[1:], start=1):
        total = torch.addcmul(total, weights_SBJ[..., j : j + 1], state.to(total.dtype))
    return total.to(states_SBH[0].dtype)


def _stacked_sum(weights_SBJ: Tensor, states_SBH: Sequence[Tensor]) -> Tensor:
    """``_plain_sum`` as a matrix product, for compiled inference.

    torch 2.13's inductor fuses ``_plain_sum`` into a kernel that runs before operators that write a state in
    place, and the result is wrong without an error. vLLM's linear layers on CPUs are such operators. Inductor
    doesn't fuse a matrix product.
    """
    states_SBJH = torch.stack([state.to(weights_SBJ.dtype) for state in states_SBH], dim=-2)
    return (weights_SBJ.unsqueeze(-2) @ states_SBJH).squeeze(-2).to(states_SBH[0].dtype)


class _WeightedSum(torch.autograd.Function):
    """Saves the states and the weights, and no product of them.

    Written out with ``*`` and ``+``, autograd would run one kernel and make one [S, B, H] temporary
    for each, forward and backward.
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
    """``sum_j weights[..., j] * states[j]``, accumulated in at least float32.

    Args:
        weights_SBJ: [S, B, J], float32 or wider.
        states_SBH: J tensors [S, B, H] of one dtype, which is also the result's.
    """
    # A trace can't hold a Python function. Compilers fuse the plain sum themselves, and torch's refuses a
    # function that gets one tensor twice, as this one does in a model without a prelude.
    compiling = torch.compiler.is_compiling()
    if torch.is_grad_enabled() and not (compiling or torch.jit.is_tracing()):
        return _WeightedSum.apply(weights_SBJ, *states_SBH)
    if compiling and not torch.is_grad_enabled():
        return _stacked_sum(weights_SBJ, states_SBH)
    return _plain_sum(weights_SBJ, states_SBH)
