"""Compare the generation speed of looped models with stock GPT-NeoX of the same unrolled depth, with a cache.

    python -m tools.bench.generation --layers 2+4R2+2 --hidden-size 768 --num-attention-heads 12

Weights are random. The models take turns, and ratios are taken within a round.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from megatron_mesh import command
from megatron_mesh.config.layout import LayerLayout, parse_layers
from megatron_mesh.config.settings import at_least
from megatron_mesh.errors import UserError
from megatron_mesh.hf.modeling.configuration_mesh import MeshConfig
from megatron_mesh.hf.modeling.modeling_mesh import MeshForCausalLM
from megatron_mesh.recurrence import SCHEMES
from megatron_mesh.runtime import device
from tools.bench.measure import now
from tools.bench.report import Spread

STOCK = "stock GPT-NeoX"


@dataclass(frozen=True)
class Options:
    """Sizes of the models and of the text."""

    layers: str = "2+4R2+2"
    """Layers of the looped models, as prelude+coreRloops+coda."""
    schemes: tuple[str, ...] = ("base", "mesh")
    """Recurrence schemes with a shared core."""
    hidden_size: int = 768
    """Hidden size."""
    num_attention_heads: int = 12
    """Attention heads."""
    vocab_size: int = 50304
    """Vocabulary size."""
    batch_size: int = 1
    """Sequences generated at once."""
    prompt_tokens: int = 64
    """Tokens in each prompt."""
    new_tokens: int = 64
    """Tokens to generate for each prompt."""
    rounds: int = 10
    """Measured rounds, after one warm-up round."""
    bf16: bool = False
    """Use bfloat16 weights instead of float32."""


def main(options: Options) -> None:
    """Measure, and print a table."""
    layers = parse_layers(options.layers)
    if not layers.shared:
        raise UserError(f"--layers {options.layers} has no loop; write prelude+coreRloops+coda, e.g. 2+4R2+2")
    for scheme in options.schemes:
        if scheme not in SCHEMES or not SCHEMES[scheme].shared_core:
            looped = ", ".join(name for name, each in SCHEMES.items() if each.shared_core)
            raise UserError(f"--schemes {scheme} is not a scheme with a shared core; choose from {looped}")
    at_least(1, options, "batch_size", "prompt_tokens", "new_tokens", "rounds")
    length = options.prompt_tokens + options.new_tokens
    shape = ModelShape(layers, options.hidden_size, options.num_attention_heads, options.vocab_size, length)
    torch.manual_seed(0)
    prompt = torch.randint(shape.vocab_size, (options.batch_size, options.prompt_tokens))
    models = build_models(shape, options.schemes)
    if options.bf16:
        models = {name: model.bfloat16() for name, model in models.items()}
    found = measure_generation(models, prompt, options.new_tokens, options.rounds)
    print(f"{'model':<16}  tokens/s  ratio to stock, median (quartiles) of {options.rounds} rounds")
    for name, speeds in found.items():
        ratios = [ours / stock for ours, stock in zip(speeds, found[STOCK], strict=True)]
        print(f"{name:<16}  {median(speeds):>8.1f}  {Spread.of(ratios)}")


@dataclass(frozen=True)
class ModelShape:
    """Sizes that all models share."""

    layers: LayerLayout
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int


def build_models(shape: ModelShape, schemes: Sequence[str]) -> dict[str, PreTrainedModel]:
    """Build randomly initialized models by name: stock GPT-NeoX of the unrolled depth, and one per scheme."""
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
    """Measure tokens per second of each model, once per round. Each round has a new random order.

    Args:
        prompt: token ids [B, S].
        new_tokens: how many tokens to generate for each sequence.
    """
    found: dict[str, list[float]] = {name: [] for name in models}
    order = random.Random(0)
    prompt = prompt.to(device.device())
    for index in track(range(rounds + 1), "rounds", console=Console(stderr=True)):
        for name in order.sample(list(models), len(models)):
            seconds = _seconds(models[name], prompt, new_tokens)
            if index:  # the first round is the warm-up
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


if __name__ == "__main__":
    command.run(main)
