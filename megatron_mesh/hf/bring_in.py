"""Converts a Hugging Face directory to a Megatron checkpoint: our exports, and GPT-NeoX such as Pythia."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from megatron_mesh.checkpoint import offline
from megatron_mesh.checkpoint.boxes import Box, cut
from megatron_mesh.checkpoint.save import description
from megatron_mesh.config.derived import layout, padded_vocab_size
from megatron_mesh.config.dump import dump_config
from megatron_mesh.config.schema import Config, ModelConfig
from megatron_mesh.errors import UserError
from megatron_mesh.hf import folding, vocabulary
from megatron_mesh.hf.check_weights import check_weights
from megatron_mesh.hf.config_file import dropout_note, read_config
from megatron_mesh.hf.describe import SETTINGS_KEY
from megatron_mesh.hf.names import EMBEDDING, RECURRENCE, VOCABULARY, Entry, entries
from megatron_mesh.hf.recursive import CoreInit, layer_sources, recursive_model
from megatron_mesh.hf.settings import model_settings, own_settings
from megatron_mesh.hf.weights import Weights
from megatron_mesh.model.config import recurrence_options
from megatron_mesh.model.init import drawn
from megatron_mesh.recurrence import build_scheme

Take = Callable[[Entry], Tensor]
"""Returns the checkpoint's tensor of an entry."""


@dataclass(frozen=True)
class Recursive:
    """How to turn a plain model into a recursive one."""

    layers: str
    recurrence: str = "mesh"
    core: CoreInit = "average"
    seed: int = 1234
    """Seed of the new routers."""


def bring_in(directory: Path, save: Path, recursive: Recursive | None = None) -> ModelConfig:
    """Write the weights in a Hugging Face directory as a checkpoint that ``--finetune`` starts from.

    One tensor at a time is in memory. Says on stderr what the checkpoint leaves out. Returns
    the model's settings.

    Raises:
        UserError: the model is one that we cannot reproduce exactly, its weights do not fit its config.json,
            or ``save`` exists.
    """
    if save.exists():
        raise UserError(f"{save} exists already; choose another --save")
    config_json = read_config(directory)
    source = model_settings(config_json, directory)
    weights = Weights(directory)
    dtype = check_weights(source, weights, config_json["vocab_size"])
    names = ("gpt_neox.embed_in.weight", "embed_out.weight")
    source, embedding = folding.taken_out(source, config_json.get(SETTINGS_KEY, {}), weights, *names)
    kept = vocabulary.left_out(config_json, own_settings(config_json), directory) or {}
    model, take = source, _tensors(source, weights, embedding, kept, dtype)
    if recursive is not None:
        model = recursive_model(source, recursive.layers, recursive.recurrence)
        take = _recursive_tensors(take, source, model, recursive)
    for note in filter(None, (dropout_note(config_json), _dtype_note(dtype))):
        print(f"note: {note}", file=sys.stderr)
    # Tied weights that were folded are two tensors in an export.
    once = {(entry.key, entry.layer): entry for entry in entries(model)}
    listed = track(list(once.values()), "tensors", console=Console(stderr=True))
    boxes = (box for entry in listed for box in _boxes(entry, take(entry)))
    config = Config(model=model)
    config.training.bf16 = dtype != torch.float32
    start: dict[str, Any] = {
        "step": 0,
        "consumed_samples": 0,
        "train_loss": None,
        "valid_loss": None,
        "schedule": {},
    }
    offline.write(save, boxes, dump_config(config), {**description(start), "weights_only": True})
    return model


def _dtype_note(dtype: torch.dtype) -> str | None:
    if dtype != torch.float16:
        return None
    return (
        "the weights are float16 and stay so in the checkpoint; a run in bfloat16 (its config.yaml says "
        "bf16) rounds them when it loads them, and a run with --no-bf16 does not"
    )


def _tensors(
    model: ModelConfig,
    weights: Weights,
    embedding: Tensor | None,
    kept: dict[str, Tensor],
    dtype: torch.dtype,
) -> Take:
    """Return the checkpoint's tensors: the export's in ``dtype``, with the vocabulary padded.

    Args:
        embedding: taken instead of the export's, if given.
        kept: rows of the vocabulary that the export left out.
    """

    def take(entry: Entry) -> Tensor:
        replaced = embedding if entry.key == EMBEDDING else None
        tensor = (weights[entry.name] if replaced is None else replaced).to(entry.dtype(dtype))
        if entry.key in VOCABULARY:
            return vocabulary.from_export(tensor, padded_vocab_size(model), kept.get(entry.key))
        return tensor

    return take


def _recursive_tensors(given: Take, source: ModelConfig, model: ModelConfig, recursive: Recursive) -> Take:
    """Return the recursive model's tensors, made from those of the plain one."""
    plain = {(entry.key, entry.layer): entry for entry in entries(source)}
    places = layer_sources(layout(model), recursive.core)
    routers = _new_routers(model, recursive.seed)

    def take(entry: Entry) -> Tensor:
        if entry.key.startswith(RECURRENCE):
            return routers[entry.key.removeprefix(RECURRENCE)]
        if entry.layer is None:
            return given(plain[entry.key, None])
        _, part, rest = entry.key.split(".", 2)  # "decoder.core.layers..."; plain: "decoder.layers..."
        tensors = [given(plain[f"decoder.{rest}", index]) for index in places[part][entry.layer]]
        return torch.stack([tensor.float() for tensor in tensors]).mean(0).to(tensors[0].dtype)

    return take


def _new_routers(model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Return the scheme's parameters as a new model with this seed draws them."""
    scheme = build_scheme(
        model.recurrence, model.hidden_size, layout(model).loops, recurrence_options(model)
    ).requires_grad_(False)

    def draw(name: str, weight: Tensor, std: float) -> None:
        weight.copy_(drawn(weight.shape, f"{seed}/{RECURRENCE}{name}", std))

    scheme.init_parameters(draw)
    return dict(scheme.named_parameters())


def _boxes(entry: Entry, tensor: Tensor) -> Iterator[Box]:
    if entry.layer is None:
        return cut(entry.key, tuple(tensor.shape), tensor)
    return cut(entry.key, (entry.layers, *tensor.shape), tensor[None], (entry.layer, *[0] * tensor.dim()))
