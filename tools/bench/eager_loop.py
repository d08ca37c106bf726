"""A looped GPT-NeoX as one would write it without this project: Hugging Face layers and a Python loop.

It computes the base recurrence, with the same sizes and parameter count as our base:

- transformers' ``GPTNeoXLayer`` and rotary embedding. Attention uses ``scaled_dot_product_attention``
  (transformers' default) or explicit scores (``--eager-attention eager``).
- ``for _ in range(loops)`` over the layers of the core.

``variants.EagerVariant`` trains it: float32 parameters, ``torch.autocast`` for bf16 (it casts each weight
once per forward pass), micro-batches accumulated by hand, ``clip_grad_norm_`` and ``torch.optim.AdamW`` (not
the fused one).

Nothing is fused or compiled, but nothing slows it down either: no Trainer, no callbacks, no label shifting by
copies. The suffix ``-compiled`` puts the layers through ``torch.compile``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_mesh.config.layout import layout, padded_vocab_size
from megatron_mesh.config.schema import ModelConfig
from tools.bench.settings import EagerAttention


class EagerLoop(nn.Module):
    """Embedding, prelude, K loops of the core, coda, norm and output projection."""

    def __init__(self, model: ModelConfig, attention: EagerAttention = "sdpa"):
        """Build from resolved settings. Needs transformers."""
        super().__init__()
        from transformers import GPTNeoXConfig
        from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXRotaryEmbedding

        layers, h, vocabulary = layout(model), model.hidden_size, padded_vocab_size(model)
        sizes: dict[str, Any] = {
            "vocab_size": vocabulary,
            "hidden_size": h,
            "num_hidden_layers": layers.unique_layers,
            "num_attention_heads": model.num_attention_heads,
            "intermediate_size": model.ffn_hidden_size,
            "max_position_embeddings": model.seq_length,
            "layer_norm_eps": model.norm_epsilon,
            "rotary_pct": model.rotary_percent,
            "rotary_emb_base": model.rotary_base,
            "attn_implementation": attention,
        }
        config = GPTNeoXConfig(**sizes)

        def stack(count: int) -> nn.ModuleList:
            return nn.ModuleList(GPTNeoXLayer(config, index) for index in range(count))

        self.loops = layers.loops
        self.scale = h**0.5 if model.scale_embeddings else 1.0
        self.embed_in = nn.Embedding(vocabulary, h)
        self.prelude, self.core, self.coda = stack(layers.prelude), stack(layers.core), stack(layers.coda)
        self.norm = nn.LayerNorm(h, eps=model.norm_epsilon)
        self.embed_out = nn.Linear(h, vocabulary, bias=False)
        self.rotary = GPTNeoXRotaryEmbedding(config)
        self.explicit_scores = attention == "eager"
        self.apply(_init)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, S] -> logits [B, S, vocabulary]."""
        x = self.embed_in(tokens) * self.scale
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        rotary = self.rotary(x, positions)
        mask = None  # scaled_dot_product_attention takes this as causal
        if self.explicit_scores:
            mask = torch.full((tokens.shape[1],) * 2, float("-inf"), device=tokens.device).triu(1)[None, None]
        for stack in (self.prelude, *[self.core] * self.loops, self.coda):
            for layer in stack:
                x = layer(x, attention_mask=mask, position_embeddings=rotary)
                x = x[0] if isinstance(x, tuple) else x  # transformers 4 returns a tuple
        return self.embed_out(self.norm(x))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
