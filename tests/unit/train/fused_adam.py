"""A stand-in for Transformer Engine's and apex's FusedAdam, which counts updates per parameter group."""

from typing import Any

import pytest
import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


class FusedAdam(torch.optim.Optimizer):
    """AdamW with an integer step in each group (``transformer_engine/pytorch/optimizers`` 2.11)."""

    def __init__(
        self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float, adam_w_mode: bool
    ):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load only the moments, like Transformer Engine's."""
        for state in state_dict["state"].values():
            assert set(state) == set(MOMENTS), state.keys()
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Do one update."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert type(group["step"]) is int  # what the kernel takes
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(parameter)
        first, second = (state[name] for name in MOMENTS)
        (beta1, beta2), step = group["betas"], group["step"]
        first.lerp_(parameter.grad, 1 - beta1)
        second.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        scale = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(first, scale, value=-group["lr"] / (1 - beta1**step))


def install(patch: pytest.MonkeyPatch) -> None:
    """Make Megatron-core use it, as if Transformer Engine were installed."""
    for module in (megatron_optimizer, distrib_optimizer):
        patch.setattr(module, "Adam", FusedAdam)
    patch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    patch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
