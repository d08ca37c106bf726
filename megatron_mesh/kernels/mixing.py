"""A weighted sum of states that touches each tensor in GPU memory once, in forward and in backward.

The forward reads J states and writes one. The backward reads the gradient and the J states, and writes J
state gradients. torch's operations (``recurrence/mixing.py``) move more: for every state they read and write
the running total, and in backward the gradient and its products with the states.

We leave two neighbouring computations unfused. The numbers are for N = 5, J = 4, H = 2048 in bf16:

- The weights of the sum (the gains in ``recurrence/memory.py``) are computed from J N numbers per token.
  These take 80 bytes, and the states 20 KiB, so fusing would save half a percent.
- The next cycle's router logits: fusing would save reading a state twice (8 KiB per token). But every program
  would have to load all 2 N H router weights (40 KiB).
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mesh.recurrence import mixing

STATE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def weighted_sum(weights_SBJ: Tensor, states_SBH: Sequence[Tensor]) -> Tensor:
    """Compute ``sum_j weights[..., j] * states[j]`` in float32, like ``recurrence.mixing.weighted_sum``.

    That function also handles what the kernels can't: other types, such as float64, and empty tensors.
    Non-contiguous tensors are copied first. There is no second derivative.

    Args:
        weights_SBJ: [S, B, J], float32.
        states_SBH: J tensors [S, B, H] in bfloat16, float16 or float32; the result has the first one's type.
    """
    shape = states_SBH[0].shape
    assert weights_SBJ.shape == (*shape[:-1], len(states_SBH)), "one weight per token and state"
    assert all(state.shape == shape for state in states_SBH), "all states must have the same shape"
    supported = weights_SBJ.dtype == torch.float32 and all(x.dtype in STATE_DTYPES for x in states_SBH)
    if not supported or shape.numel() == 0:
        return mixing.weighted_sum(weights_SBJ, states_SBH)
    return _WeightedSum.apply(weights_SBJ, *states_SBH)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights_SBJ: Tensor, *states_SBH: Tensor) -> Tensor:
        ctx.save_for_backward(weights_SBJ, *states_SBH)
        states = _contiguous(states_SBH)
        out = torch.empty_like(states[0])
        _kernels().forward(out, weights_SBJ.contiguous(), states)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SBH: Tensor) -> tuple[Tensor | None, ...]:
        weights, *states = ctx.saved_tensors
        weights, states = weights.contiguous(), _contiguous(states)
        grads = [
            torch.empty_like(x) if need else None
            for x, need in zip((weights, *states), ctx.needs_input_grad, strict=True)
        ]
        _kernels().backward(grads[0], tuple(grads[1:]), grad_SBH.contiguous(), weights, states)
        return tuple(grads)


def _contiguous(states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(state.contiguous() for state in states)


def _kernels() -> ModuleType:
    from . import triton_mixing  # imports triton, which is optional

    return triton_mixing
