"""Attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class DotProductAttention(torch.nn.Module):
    """Causal attention; [S, B, heads, head size] three times -> [S, B, H]."""

    def __init__(self, num_attention_heads: int, kv_channels: Any, softmax_scale: Any = None, **kwargs: Any):
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """See the class."""
        assert attention_mask is None and kwargs["attn_mask_type"] == "causal"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(2)
