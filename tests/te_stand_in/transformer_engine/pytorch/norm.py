"""LayerNorm."""

from typing import Any

import torch


class LayerNorm(torch.nn.LayerNorm):
    """torch's norm, with parameters marked as by Transformer Engine."""

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float,
        sequence_parallel: bool,
        params_dtype: torch.dtype,
        **kwargs: Any,
    ):
        super().__init__(hidden_size, eps=eps, dtype=params_dtype, device=kwargs["device"])
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel

    def get_extra_state(self) -> torch.Tensor:
        """Empty, as for Transformer Engine's operations without FP8."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        """There is no state to load."""


class RMSNorm(LayerNorm):
    """Named by Megatron-core, never built."""
