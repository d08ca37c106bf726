"""``Linear`` and ``LayerNormLinear`` with the documented contract of ``is_first_microbatch``.

True: cast the weight and keep the cast; the fused weight gradient overwrites ``main_grad``.
False: use the kept cast; the weight gradient is added to ``main_grad``. None: cast and do not keep; add.
"""

import pickle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, History, to_fp8


class _Multiply(torch.autograd.Function):
    """x @ cast.T. With fused gradients, its backward writes ``weight.main_grad``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cast: Tensor, fuse: bool, first: bool | None) -> Tensor:
        ctx.save_for_backward(x, cast)
        ctx.weight, ctx.fuse, ctx.accumulate = weight, fuse, not first
        return x @ cast.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, cast = ctx.saved_tensors
        of_weight = grad.flatten(0, -2).float().t() @ x.flatten(0, -2).float()
        if not ctx.fuse:
            return grad @ cast, of_weight.to(cast.dtype), None, None, None
        main_grad = ctx.weight.main_grad
        if ctx.accumulate:
            main_grad.add_(of_weight)
        else:
            main_grad.copy_(of_weight)
        ctx.weight.grad_added_to_main_grad = True
        # As in Transformer Engine, what is returned must not be read: here it would be seen.
        return grad @ cast, torch.full_like(cast, float("nan")), None, None, None


class Linear(torch.nn.Module):
    """[..., in_features] -> [..., out_features]; with ``return_bias`` the bias is returned, not added."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        params_dtype: torch.dtype,
        device: Any,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_size: int = 1,
        tp_group: Any = None,
        **kwargs: Any,
    ):
        super().__init__()
        assert tp_size == 1, "the stand-in has no tensor parallelism"
        self.tp_size, self.tp_rank, self.parallel_mode = tp_size, 0, parallel_mode
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.return_bias, self.fuse_wgrad_accumulation = return_bias, fuse_wgrad_accumulation
        self.save_original_input = False
        self.weight = Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        self.bias = Parameter(torch.zeros(out_features, dtype=params_dtype, device=device)) if bias else None
        sides = [(self.weight, 1 if parallel_mode == "row" else 0)]
        if bias and parallel_mode == "column":
            sides.append((self.bias, 0))
        for parameter, side in sides:
            parameter.tensor_model_parallel = True
            parameter.partition_dim, parameter.partition_stride = side, 1
        self.kept: Tensor | None = None
        self.history: History | None = None
        self.fp8_checkpoint = False
        self.flags: list[bool | None] = []
        self.casts = 0

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """See the module. Rejects the same settings as Transformer Engine."""
        assert all(p.dtype == x.dtype for p in self.parameters()), "Data types for parameters must match"
        self.flags.append(is_first_microbatch)
        x, cast = self._cast(x, is_first_microbatch)
        y = _Multiply.apply(x, self.weight, cast, self.fuse_wgrad_accumulation, is_first_microbatch)
        if self.return_bias:
            return y, self.bias
        return y if self.bias is None else y + self.bias

    def _cast(self, x: Tensor, first: bool | None) -> tuple[Tensor, Tensor]:
        weight = self.weight.detach()
        recipe = FP8GlobalStateManager.recipe
        if recipe is None:
            return x, weight
        for tensor in (x, weight):
            assert tensor.shape[:-1].numel() % 8 == 0 and tensor.shape[-1] % 16 == 0, tensor.shape
        if recipe.delayed() and self.history is None:
            self.history = History(recipe)
        history = self.history if recipe.delayed() else None
        x = x + (to_fp8(x.detach(), history and history.record(0, x.detach())) - x.detach())
        if first is False and self.kept is not None:
            return x, self.kept
        self.casts += 1
        cast = to_fp8(weight, history and history.record(1, weight))
        if first is not None:
            self.kept = cast
        return x, cast

    def get_extra_state(self) -> Tensor:
        """A pickle, as in Transformer Engine; empty without FP8."""
        if not self.casts and not self.fp8_checkpoint:
            return torch.empty(0, dtype=torch.uint8)
        state: dict[str, Any] = {"extra_fp8_variables": {"num_gemms": 1}}
        if self.history is not None:
            state |= {"recipe": self.history.recipe} | self.history.tensors()
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        """Requires the entries that Transformer Engine does: recipe, number of products, four tensors."""
        if state is None or state.numel() == 0:
            return
        values = pickle.loads(state.numpy().tobytes())
        assert values["extra_fp8_variables"]["num_gemms"] == 1
        self.fp8_checkpoint = values["extra_fp8_variables"].get("fp8_checkpoint", False)
        self.history = History(values["recipe"])
        for name, tensor in self.history.tensors().items():
            tensor.copy_(values[name])


class LayerNormLinear(Linear):
    """``Linear`` of the normed input."""

    def __init__(self, in_features: int, out_features: int, *, eps: float, **kwargs: Any):
        super().__init__(in_features, out_features, **kwargs)
        self.eps = eps
        place = {"dtype": kwargs["params_dtype"], "device": kwargs["device"]}
        self.layer_norm_weight = Parameter(torch.ones(in_features, **place))
        self.layer_norm_bias = Parameter(torch.zeros(in_features, **place))
        for parameter in (self.layer_norm_weight, self.layer_norm_bias):
            parameter.sequence_parallel = kwargs.get("sequence_parallel", False)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """See the module."""
        normed = F.layer_norm(x, (self.in_features,), self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return super().forward(normed, is_first_microbatch)


class GroupedLinear(Linear):
    """Named by Megatron-core, never built."""
