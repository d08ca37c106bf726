"""Tokens per second of ``generate`` with a cache: looped models beside stock GPT-NeoX of the same depth."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from megatron_mesh.bench.clock import now
from megatron_mesh.config.layers import LayerLayout
from megatron_mesh.hf.configuration_mesh import MeshConfig
from megatron_mesh.hf.modeling_mesh import MeshForCausalLM
from megatron_mesh.runtime import device

STOCK = "stock GPT-NeoX"


@dataclass(frozen=True)
class Shape:
    """What all models have in common."""

    layers: LayerLayout
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int


def build_models(shape: Shape, schemes: Sequence[str]) -> dict[str, PreTrainedModel]:
    """Random models by name: the stock one of the unrolled depth, and each scheme's."""
    layers = shape.layers
    sizes: dict[str, Any] = {
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "intermediate_size": 4 * shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
    }
    models: dict[str, PreTrainedModel] = {
        STOCK: GPTNeoXForCausalLM(GPTNeoXConfig(num_hidden_layers=layers.depth, **sizes))
    }
    for scheme in schemes:
        config = MeshConfig(
            recurrence=scheme,
            prelude_layers=layers.prelude,
            core_layers=layers.core,
            num_loops=layers.loops,
            coda_layers=layers.coda,
            mesh_slots=layers.loops + 3,
            embedding_scale=shape.hidden_size**0.5,
            **sizes,
        )
        models[scheme] = MeshForCausalLM(config)
    where: Any = device.device()
    return {name: model.to(where).eval() for name, model in models.items()}


def measure_generation(
    models: Mapping[str, PreTrainedModel], prompt: Tensor, new_tokens: int, rounds: int
) -> dict[str, list[float]]:
    """Tokens per second of each model, one figure a round; the order within a round is drawn anew.

    Args:
        prompt: ids [B, S].
        new_tokens: how many are added to each row.
    """
    found: dict[str, list[float]] = {name: [] for name in models}
    order = random.Random(0)
    prompt = prompt.to(device.device())
    for index in track(range(rounds + 1), "rounds", console=Console(stderr=True)):
        for name in order.sample(list(models), len(models)):
            seconds = _seconds(models[name], prompt, new_tokens)
            if index:  # the first round is to warm up
                found[name].append(prompt.shape[0] * new_tokens / seconds)
    return found


def _seconds(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> float:
    start = now()
    ids = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        eos_token_id=None,
    )
    seconds = now() - start
    assert ids.shape[1] == prompt.shape[1] + new_tokens
    return seconds
