"""Tiny random models, and the stock GPT-NeoX that computes the same as a given looped model."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from megatron_mesh.hf.modeling.configuration_mesh import MeshConfig
from megatron_mesh.hf.modeling.modeling_mesh import MeshForCausalLM

ROUTED = ["mesh", "vanilla+mesh", "dynamic", "static"]
"""The schemes that have parameters."""
SCHEMES = [*ROUTED, "base"]
END, PADDING = 2, 3
IDS = torch.randint(4, 96, (2, 8), generator=torch.Generator().manual_seed(1))
"""Prompts [2, 8] without special tokens."""


def mesh_config(scheme: str = "mesh", **changes: Any) -> MeshConfig:
    """Return a configuration with the layers 1+2R2+1, hidden size 32, and a vocabulary of 96."""
    settings = {
        "recurrence": scheme,
        "prelude_layers": 1,
        "core_layers": 2,
        "num_loops": 2,
        "coda_layers": 1,
        "embedding_scale": 32**0.5,
        "initializer_range": 0.3,
        **_sizes(),
        **changes,
    }
    return MeshConfig(**settings)


def looped(scheme: str = "mesh", kind: type[PreTrainedModel] = MeshForCausalLM, **changes: Any) -> Any:
    """Return a random model of a scheme, in evaluation mode."""
    return randomised(kind(mesh_config(scheme, **changes))).eval()


def stock(kind: type[PreTrainedModel] = GPTNeoXForCausalLM, layers: int = 6, **changes: Any) -> Any:
    """Return a random GPT-NeoX of the same size, in evaluation mode."""
    return randomised(kind(GPTNeoXConfig(**{**_sizes(), "num_hidden_layers": layers, **changes}))).eval()


def unrolled_twin(model: Any, kind: type[PreTrainedModel] = GPTNeoXForCausalLM) -> Any:
    """Return the stock GPT-NeoX that a model with the base recursion becomes when its loop is unrolled."""
    assert model.config.recurrence == "base"
    body = model.base_model
    twin = stock(kind, layers=len(body.unrolled), num_labels=model.config.num_labels)
    stack = twin.base_model
    layers = [layer for layers in body.passes for layer in layers]
    pairs = [*zip(layers, stack.layers, strict=True), (body.final_layer_norm, stack.final_layer_norm)]
    pairs += list(zip(_heads(model), _heads(twin), strict=True))
    with torch.no_grad():
        stack.embed_in.weight.copy_(body.embed_in.weight * model.config.embedding_scale)
        for one, other in pairs:
            other.load_state_dict(one.state_dict())
    return twin


def randomised(model: nn.Module) -> Any:
    """Randomize every parameter, so that routers and scales differ from their initial values."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            spread = 0.5 if "attention" in name else 0.2  # makes tokens depend on earlier ones
            parameter.copy_(1 + 0.1 * noise if "norm.weight" in name else spread * noise)
    return model


def greedy(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    """Generate greedily and return tokens [B, S + 12]; ``options`` override the arguments of ``generate``."""
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, **options}
    return model.generate(ids, **how)


def _heads(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_children() if name not in ("model", "gpt_neox")]


def _sizes() -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "eos_token_id": END,
        "pad_token_id": PADDING,
    }
