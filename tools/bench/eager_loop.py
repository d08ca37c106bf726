"""A looped GPT-NeoX as a researcher would otherwise write it: Hugging Face layers and a loop in eager torch.

It computes the base recursion, with the same sizes and as many parameters as our base:

- transformers' ``GPTNeoXLayer`` and rotary embedding; attention by ``scaled_dot_product_attention``, which is
  transformers' choice, or with the scores written out (``--eager-attention eager``);
- ``for _ in range(loops)`` over the layers of the core;
- parameters in float32; bf16 by ``torch.autocast``, which casts each weight once a forward pass;
- micro-batches accumulated by hand, ``clip_grad_norm_``, ``torch.optim.AdamW`` (not the fused one).

No kernel is fused and nothing is compiled, but nothing is slowed down either: no Trainer, no callbacks, no
labels shifted by copies. With the ending ``-compiled`` the layers go through ``torch.compile``.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mesh.bench.settings import EagerAttention
from megatron_mesh.bench.variants import Variant
from megatron_mesh.config.derived import layout, padded_vocab_size
from megatron_mesh.config.schema import Config, ModelConfig
from megatron_mesh.data import Batch
from megatron_mesh.runtime import device, ranges


class EagerLoop(nn.Module):
    """Embedding, prelude, K times the core, coda, norm, output projection."""

    def __init__(self, model: ModelConfig, attention: EagerAttention = "sdpa"):
        """``model``: resolved settings; transformers must be installed."""
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
        self.writes_scores = attention == "eager"
        self.apply(_init)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, S] -> logits [B, S, vocabulary]."""
        x = self.embed_in(tokens) * self.scale
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        rotary = self.rotary(x, positions)
        mask = None  # causal, to scaled_dot_product_attention
        if self.writes_scores:
            mask = torch.full((tokens.shape[1],) * 2, float("-inf"), device=tokens.device).triu(1)[None, None]
        for stack in (self.prelude, *[self.core] * self.loops, self.coda):
            for layer in stack:
                x = layer(x, attention_mask=mask, position_embeddings=rotary)
                x = x[0] if isinstance(x, tuple) else x  # a tuple in transformers 4
        return self.embed_out(self.norm(x))


class EagerVariant(Variant):
    """An ``EagerLoop`` with the training step written by hand."""

    def __init__(self, name: str, config: Config, attention: EagerAttention = "sdpa"):
        """``attention``: see ``EagerLoop``."""
        self.name, self.config = name, config
        torch.manual_seed(config.training.seed)
        with device.device():
            self.model: EagerLoop = EagerLoop(config.model, attention)
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.lr,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
        )

    def losses(self, batch: Batch) -> Tensor:
        tokens, labels = batch.tokens.to(device.device()), batch.labels.to(device.device())
        with self._autocast():
            logits = self.model(tokens)
            return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    def step(self, batches: Sequence[Batch]) -> None:
        with ranges.named("clear"):
            self.optimizer.zero_grad()
        with ranges.named("forward-backward"):
            for batch in batches:
                (self.losses(batch) / len(batches)).backward()
        with ranges.named("update"):
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_grad)
            self.optimizer.step()

    @property
    def layers(self) -> Iterable[nn.Module]:
        return [*self.model.prelude, *self.model.core, *self.model.coda]

    def _autocast(self) -> AbstractContextManager:
        if not self.config.training.bf16:
            return nullcontext()
        return torch.autocast(device.device().type, torch.bfloat16)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
