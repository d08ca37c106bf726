"""Layers of a MeSH model. Weights and positions in the unrolled network are separate modules.

A core layer has one set of weights but runs once in each loop, each time with a KV cache of its own.
``MeshLayer`` holds the weights. ``UnrolledLayer`` stands for one application of a layer: it has no weights,
only the index by which caches and serving engines tell the applications apart.
"""

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import GPTNeoXConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXMLP,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""Name of the cache in outputs of transformers: ``cache`` since 5.24, ``past_key_values`` before."""


class AttentionDispatcher(nn.Module):
    """Updates the KV cache and calls the attention function, for one application of a layer. Has no weights.

    ``generate_batch`` and vLLM's Transformers backend allocate one KV cache for each such module, identified
    by ``layer_idx`` (0 to unrolled depth - 1), and read ``scaling`` and ``is_causal`` from it.
    """

    def __init__(self, config: GPTNeoXConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.is_causal = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        layer_past: Any = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention over the cached and the new tokens.

        Args:
            query, key, value: tensors of shape [B, heads, S, head size].
            attention_mask: a mask made by ``create_causal_mask``.
            layer_past: a ``Cache``, or the paged cache of ``generate_batch``.
            cache_position: positions [S] of the tokens in a static cache; only transformers 4 needs them.
            kwargs: further arguments of the attention function.

        Returns:
            The output [B, S, heads, head size], and the attention weights (None unless attention is eager).
        """
        if isinstance(layer_past, Cache):
            where = {"cache_position": cache_position}
            key, value = layer_past.update(key, value, self.layer_idx, where)
        elif layer_past is not None and CACHE_NAME == "cache":
            key, value = layer_past.update(key, value, self.layer_idx, kwargs)  # also updates kwargs
        elif layer_past is not None:
            kwargs["cache"] = layer_past  # the attention function updates it
        name = self._implementation(paged="cache" in kwargs)
        attend = eager_attention_forward
        if name != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[name]  # vLLM looks for this call in the source code
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return output, weights

    def _implementation(self, paged: bool) -> str:
        name = self.config._attn_implementation
        if paged and f"{name}_paged" in ALL_ATTENTION_FUNCTIONS:
            name = f"{name}_paged"  # transformers 4 doesn't choose it, and others ignore the paged cache
        return name


class MeshAttention(nn.Module):
    """Input and output projections of GPT-NeoX's attention.

    The rows of query, key and value are interleaved per head.
    """

    def __init__(self, config: GPTNeoXConfig):
        super().__init__()
        self.head_size = config.hidden_size // config.num_attention_heads
        self.attention_dropout = config.attention_dropout
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        dispatcher: nn.Module,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> Tensor:
        """Map [B, S, H] to [B, S, H]. Under tensor parallelism each rank holds some of the heads."""
        shape = hidden_states.shape[:-1]
        heads = self.query_key_value(hidden_states).view(*shape, -1, 3 * self.head_size).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=-1)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        dropout = self.attention_dropout if self.training else 0.0
        output, _ = dispatcher(query, key, value, dropout=dropout, **kwargs)
        return self.dense(output.reshape(*shape, -1).contiguous())


class MeshLayer(GradientCheckpointingLayer):
    """Weights of a GPT-NeoX layer with parallel residual, under the names of ``GPTNeoXLayer``."""

    def __init__(self, config: GPTNeoXConfig):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_dropout = nn.Dropout(config.hidden_dropout)
        self.post_mlp_dropout = nn.Dropout(config.hidden_dropout)
        self.attention = MeshAttention(config)
        self.mlp = GPTNeoXMLP(config)

    def forward(self, hidden_states: Tensor, dispatcher: nn.Module, **kwargs: Any) -> Tensor:
        """Map [B, S, H] to [B, S, H]; ``dispatcher`` is that of the present ``UnrolledLayer``."""
        attended = self.attention(self.input_layernorm(hidden_states), dispatcher, **kwargs)
        processed = self.mlp(self.post_attention_layernorm(hidden_states))
        return self.post_mlp_dropout(processed) + self.post_attention_dropout(attended) + hidden_states


class UnrolledLayer(nn.Module):
    """One application of a layer. Register hooks here to see the layer's input and output in one pass."""

    def __init__(self, config: GPTNeoXConfig, layer_idx: int):
        super().__init__()
        self.attention = AttentionDispatcher(config, layer_idx)

    def forward(self, hidden_states: Tensor, layer: nn.Module, **kwargs: Any) -> Tensor:
        """Map [B, S, H] to [B, S, H] with the weights of ``layer``."""
        return layer(hidden_states, self.attention, **kwargs)
