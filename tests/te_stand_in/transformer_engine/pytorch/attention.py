"""Attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Concatenate [S, ...] of all ranks; the backward sums all ranks' gradients for each rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
        torch.distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None


class DotProductAttention(torch.nn.Module):
    """Causal attention; [S, B, heads, head size] three times -> [S, B, H], S of this rank's tokens."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: Any,
        softmax_scale: Any = None,
        cp_group: Any = None,
        **kwargs: Any,
    ):
        super().__init__()
        self.softmax_scale, self.cp_group = softmax_scale, cp_group

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """See the class."""
        assert attention_mask is None and kwargs["attn_mask_type"] == "causal"
        places = self.places(len(query))
        key, value = (self.gather(x) for x in (key, value))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask = places[self.rank, :, None] >= places.flatten()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(2)

    @property
    def rank(self) -> int:
        """Index among the ranks that share a sequence."""
        return 0 if self.cp_group is None else self.cp_group.rank()

    def places(self, length: int) -> Tensor:
        """[ranks, length]: the tokens that each rank holds: piece r and piece r from the end."""
        ranks = 1 if self.cp_group is None else self.cp_group.size()
        pieces = torch.arange(ranks * length).view(2 * ranks, -1)
        return torch.stack([torch.cat([pieces[r], pieces[-1 - r]]) for r in range(ranks)])

    def gather(self, x: Tensor) -> Tensor:
        """[S, ...] -> [ranks x S, ...]."""
        if self.cp_group is None:
            return x
        return _Gather.apply(x, self.cp_group)
