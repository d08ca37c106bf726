"""From a Hugging Face directory to a Megatron checkpoint: our exports, and any GPT-NeoX (Pythia)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from rich.console import Console
from rich.progress import track
from torch import Tensor

from megatron_mesh.checkpoint import offline
from megatron_mesh.checkpoint.save import description
from megatron_mesh.config.derived import layout, padded_vocab_size
from megatron_mesh.config.dump import dump_config
from megatron_mesh.config.schema import Config, ModelConfig
from megatron_mesh.errors import UserError
from megatron_mesh.hf import folding, vocabulary
from megatron_mesh.hf.names import EMBEDDING, RECURRENCE, VOCABULARY, Entry, entries
from megatron_mesh.hf.recursive import CoreInit, layer_sources, recursive_model
from megatron_mesh.hf.settings import SETTINGS_KEY, model_settings, read_config
from megatron_mesh.hf.weights import Weights
from megatron_mesh.model.config import recurrence_options
from megatron_mesh.model.init import drawn
from megatron_mesh.recurrence import build_scheme

Take = Callable[[Entry], Tensor]
"""Makes the checkpoint's tensor of an entry."""


@dataclass(frozen=True)
class Recursive:
    """How to make a recursive model of a plain one."""

    layers: str
    recurrence: str = "mesh"
    core: CoreInit = "average"
    seed: int = 1234
    """For routers."""


def bring_in(directory: Path, save: Path, recursive: Recursive | None = None) -> ModelConfig:
    """Write the weights in a Hugging Face directory as a checkpoint, to start a run with ``--finetune``.

    Needs as much host memory as the weights have. Returns the model's settings.

    Raises:
        UserError: the model is of another kind, tensors are missing, or ``save`` is taken.
    """
    if save.exists():
        raise UserError(f"{save} exists already; choose another --save")
    config_json = read_config(directory)
    source = model_settings(config_json)
    weights = Weights(directory)
    _check(entries(source, config_json["vocab_size"]), weights, directory)
    names = ("gpt_neox.embed_in.weight", "embed_out.weight")
    source, embedding = folding.taken_out(source, config_json.get(SETTINGS_KEY, {}), weights, *names)
    model, take = source, _tensors(weights, embedding, padded_vocab_size(source))
    if recursive is not None:
        model = recursive_model(source, recursive.layers, recursive.recurrence)
        take = _recursive_tensors(take, source, model, recursive)
    with offline.alone():
        # Tied weights that were folded are two tensors in an export.
        once = {(entry.key, entry.layer): entry for entry in entries(model)}
        listed = track(list(once.values()), "tensors", console=Console(stderr=True))
        state = {entry.name: _sharded(entry, take(entry)) for entry in listed}
        config = Config(model=model)
        config.training.bf16 = next(iter(state.values())).data.dtype != torch.float32
        start: dict[str, Any] = {
            "step": 0,
            "consumed_samples": 0,
            "train_loss": None,
            "valid_loss": None,
            "schedule": {},
        }
        offline.write(save, state, dump_config(config), {**description(start), "weights_only": True})
    return model


def _tensors(weights: Weights, embedding: Tensor | None, rows: int) -> Take:
    """The checkpoint's tensors as the export has them; ``embedding`` where that is another.

    The vocabulary gets ``rows`` again.
    """

    def take(entry: Entry) -> Tensor:
        weight = embedding if entry.key == EMBEDDING and embedding is not None else weights[entry.name]
        if entry.key in VOCABULARY:
            return vocabulary.from_export(weight, entry.key, rows, weights.directory)
        return weight

    return take


def _recursive_tensors(given: Take, source: ModelConfig, model: ModelConfig, recursive: Recursive) -> Take:
    """The recursive model's tensors, from those of the plain one."""
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
    """The scheme's parameters as a new model of this seed has them."""
    scheme = build_scheme(
        model.recurrence, model.hidden_size, layout(model).loops, recurrence_options(model)
    ).requires_grad_(False)

    def draw(name: str, weight: Tensor, std: float) -> None:
        weight.copy_(drawn(weight.shape, f"{seed}/{RECURRENCE}{name}", std))

    scheme.init_parameters(draw)
    return dict(scheme.named_parameters())


def _sharded(entry: Entry, tensor: Tensor) -> ShardedTensor:
    tensor = tensor.contiguous()
    if entry.layer is None:
        return ShardedTensor.from_rank_offsets(entry.key, tensor)
    place = (0, entry.layer, entry.layers)
    return ShardedTensor.from_rank_offsets(entry.key, tensor, place, prepend_axis_num=1)


def _check(listed: list[Entry], weights: Weights, directory: Path) -> None:
    for entry in listed:
        if entry.name not in weights:
            raise UserError(f"{directory} lacks the tensor {entry.name}, which its config.json asks for")
        if (shape := weights.shape(entry.name)) != entry.shape:
            raise UserError(
                f"{directory}: {entry.name} is {list(shape)}, and by config.json should be "
                f"{list(entry.shape)}"
            )
