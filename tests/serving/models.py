"""Exports for serving tests, with random weights that make every token depend on all tokens before it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM

from megatron_mesh.hf.convert.export import export_checkpoint
from tests.exports import export_config, save_checkpoint
from tests.helpers import one_process

LAYERS = {
    "mesh": "1+2R2+1",
    "base": "1+1R3+1",
    "anchor": "1+2R2+1",
    "vanilla": "4",
    "vanilla+mesh": "1+1+1+1",
}
VOCABULARY = 600  # not a multiple of 128, so that the checkpoint has padded rows
LENGTH = 256
HEAD_SIZE = 32  # vLLM's CPU attention needs a multiple of 32

_ROOT = Path(__file__).resolve().parents[2]


def write_tokenizer(path: Path) -> None:
    """Write a byte-level tokenizer with 600 entries, trained on this project's sources."""
    trained = ByteLevelBPETokenizer()
    texts = [file.read_text(encoding="utf-8") for file in sorted((_ROOT / "megatron_mesh").rglob("*.py"))]
    trained.train_from_iterator(
        texts, vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False
    )
    trained.save(str(path))


def write_checkpoint(directory: Path, scheme: str, tokenizer: Path) -> Path:
    """Write a checkpoint of a random model with hidden size 64."""
    config = export_config(
        directory,
        recurrence=scheme,
        layers=LAYERS[scheme],
        hidden_size=2 * HEAD_SIZE,
        num_attention_heads=2,
        seq_length=LENGTH,
        vocab_size=VOCABULARY,
        make_vocab_size_divisible_by=128,
        init_method_std=0.3,
        tokenizer_model=str(tokenizer),
    )
    with one_process(config):
        return save_checkpoint(config)


def write_export(checkpoint: Path, directory: Path) -> Path:
    """Export a checkpoint and sharpen its attention."""
    export_checkpoint(checkpoint, directory)
    sharpen(directory)
    return directory


def sharpen(directory: Path) -> None:
    """Scale the norm weights of a model, so that attention is sharp and logits differ clearly."""
    path = directory / "model.safetensors"
    norms = ("layernorm.weight", "layer_norm.weight")
    weights = {k: 5 * v if k.endswith(norms) else v for k, v in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


@dataclass(frozen=True)
class Expected:
    """The output of transformers for one prompt."""

    tokens: list[int]
    """Greedy continuation of the prompt."""
    logprobs: list[float]
    """Log-probabilities of the prompt's tokens except the first."""


def by_transformers(directory: Path, prompts: Sequence[list[int]], new_tokens: int) -> list[Expected]:
    """Compute greedy continuations without a cache, and log-probabilities of the prompts."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32
    ).eval()
    return [_expected(model, prompt, new_tokens) for prompt in prompts]


@torch.no_grad()
def _expected(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> Expected:
    ids = torch.tensor([prompt])
    for _ in range(new_tokens):
        logits = model(ids, use_cache=False).logits[0]
        ids = torch.cat([ids, logits[-1].argmax().view(1, 1)], dim=1)
    scored = logits[: len(prompt) - 1].log_softmax(-1)
    logprobs = scored.gather(1, torch.tensor(prompt[1:]).view(-1, 1)).flatten().tolist()
    return Expected(ids[0, len(prompt) :].tolist(), logprobs)


def vocabulary_of(directory: Path) -> int:
    """Return the vocabulary size of an export."""
    return int(json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"])
