"""Converts a Hugging Face directory to a checkpoint: one of our exports, or a GPT-NeoX such as Pythia."""

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
from megatron_mesh.hf.convert.config_json import dropout_note, read_config
from megatron_mesh.hf.convert.describe import SETTINGS_KEY
from megatron_mesh.hf.convert.tensors import EMBEDDING, RECURRENCE, VOCABULARY, ExportTensor, entries
from megatron_mesh.hf.convert.weights import ModelWeights
from megatron_mesh.hf.recursive import CoreInit, layer_sources, recursive_model
from megatron_mesh.hf.settings import model_settings, own_settings
from megatron_mesh.model.init import drawn
from megatron_mesh.model.transformer_config import recurrence_options
from megatron_mesh.recurrence import build_scheme

ReadTensor = Callable[[ExportTensor], Tensor]
"""Returns the tensor that the checkpoint has for an entry."""


@dataclass(frozen=True)
class ToRecursive:
    """How to turn a plain model into a recursive one (``--to-recursive``)."""

    layers: str
    recurrence: str = "mesh"
    core: CoreInit = "average"
    seed: int = 1234
    """Seed of the new routers."""


def import_model(directory: Path, save: Path, to_recursive: ToRecursive | None = None) -> ModelConfig:
    """Write the weights in a Hugging Face directory as a checkpoint that ``--finetune`` can start from.

    Only one tensor at a time is in memory. Properties of the source that the checkpoint cannot have are
    reported on stderr.

    Returns:
        The settings of the checkpoint's model.

    Raises:
        UserError: we cannot reproduce the model exactly, its weights don't match its config.json, or ``save``
            already exists.
    """
    if save.exists():
        raise UserError(f"--save {save} already exists; choose another directory")
    config_json = read_config(directory)
    source = model_settings(config_json, directory)
    weights = ModelWeights(directory)
    dtype = check_weights(source, weights, config_json["vocab_size"])
    names = ("gpt_neox.embed_in.weight", "embed_out.weight")
    source, embedding = folding.unfold(source, config_json.get(SETTINGS_KEY, {}), weights, *names)
    omitted = vocabulary.read_omitted_rows(config_json, own_settings(config_json), directory) or {}
    model, read = source, _export_reader(source, weights, embedding, omitted, dtype)
    if to_recursive is not None:
        model = recursive_model(source, to_recursive.layers, to_recursive.recurrence)
        read = _recursive_reader(read, source, model, to_recursive)
    for note in filter(None, (dropout_note(config_json), _dtype_note(dtype))):
        print(f"note: {note}", file=sys.stderr)
    # The export of a model with tied weights and a folded scale has two entries for one tensor.
    unique = {(entry.key, entry.layer): entry for entry in entries(model)}
    listed = track(list(unique.values()), "tensors", console=Console(stderr=True))
    boxes = (box for entry in listed for box in _boxes(entry, read(entry)))
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
        "the checkpoint keeps the weights in float16; a run with bf16, as set in its config.yaml, rounds "
        "them to bfloat16 when it loads them; a run with --no-bf16 doesn't"
    )


def _export_reader(
    model: ModelConfig,
    weights: ModelWeights,
    embedding: Tensor | None,
    omitted: dict[str, Tensor],
    dtype: torch.dtype,
) -> ReadTensor:
    """Return a function that reads the export's tensors in ``dtype`` and pads the vocabulary.

    Args:
        model: settings of the checkpoint's model.
        weights: the export's weights.
        embedding: replaces the export's embedding if given.
        omitted: vocabulary rows that the export omits, by the checkpoint's tensor names.
        dtype: dtype of the checkpoint.
    """

    def read(entry: ExportTensor) -> Tensor:
        replaced = embedding if entry.key == EMBEDDING else None
        tensor = (weights[entry.name] if replaced is None else replaced).to(entry.dtype(dtype))
        if entry.key in VOCABULARY:
            return vocabulary.from_export(tensor, padded_vocab_size(model), omitted.get(entry.key))
        return tensor

    return read


def _recursive_reader(
    read_plain: ReadTensor, source: ModelConfig, model: ModelConfig, to_recursive: ToRecursive
) -> ReadTensor:
    """Return a function that makes the recursive model's tensors from those of the plain one."""
    plain = {(entry.key, entry.layer): entry for entry in entries(source)}
    sources = layer_sources(layout(model), to_recursive.core)
    routers = _new_routers(model, to_recursive.seed)

    def read(entry: ExportTensor) -> Tensor:
        if entry.key.startswith(RECURRENCE):
            return routers[entry.key.removeprefix(RECURRENCE)]
        if entry.layer is None:
            return read_plain(plain[entry.key, None])
        # The recursive model's "decoder.core.layers..." is "decoder.layers..." in the plain one.
        _, part, rest = entry.key.split(".", 2)
        tensors = [read_plain(plain[f"decoder.{rest}", index]) for index in sources[part][entry.layer]]
        return torch.stack([tensor.float() for tensor in tensors]).mean(0).to(tensors[0].dtype)

    return read


def _new_routers(model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Return the scheme's parameters, initialized as in a new model with this seed."""
    scheme = build_scheme(
        model.recurrence, model.hidden_size, layout(model).loops, recurrence_options(model)
    ).requires_grad_(False)

    def draw(name: str, weight: Tensor, std: float) -> None:
        weight.copy_(drawn(weight.shape, f"{seed}/{RECURRENCE}{name}", std))

    scheme.init_parameters(draw)
    return dict(scheme.named_parameters())


def _boxes(entry: ExportTensor, tensor: Tensor) -> Iterator[Box]:
    if entry.layer is None:
        return cut(entry.key, tuple(tensor.shape), tensor)
    return cut(entry.key, (entry.layers, *tensor.shape), tensor[None], (entry.layer, *[0] * tensor.dim()))
