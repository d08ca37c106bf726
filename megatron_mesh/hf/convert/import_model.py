"""Derives our model settings from the config.json of a Hugging Face directory.

Chooses the layers of a plain model from which a recursive model starts.

The three ways to initialize the core are those of Bae et al., "Relaxed Recursive Transformers" (arXiv
2410.20672, section 2.3).

Converts a Hugging Face directory to a checkpoint: one of our exports, or a GPT-NeoX such as Pythia.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from megatron_mesh.checkpoint import offline
from megatron_mesh.checkpoint.index import Box, cut
from megatron_mesh.checkpoint.save import describe_state
from megatron_mesh.config.layout import LayerLayout, layout, padded_vocab_size, parse_layers
from megatron_mesh.config.resolve.model import resolve_model
from megatron_mesh.config.schema import Config, ModelConfig
from megatron_mesh.config.settings import dump_config
from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert import tensors
from megatron_mesh.hf.convert.config_json import dropout_note, read_config, rotary_base, rotary_percent
from megatron_mesh.hf.convert.describe import SETTINGS_KEY
from megatron_mesh.hf.convert.tensors import (
    EMBEDDING,
    RECURRENCE,
    VOCABULARY,
    ExportTensor,
    check_weights,
    entries,
    read_omitted_rows,
)
from megatron_mesh.hf.convert.weights import ModelWeights
from megatron_mesh.model.build import drawn
from megatron_mesh.model.transformer_config import recurrence_options
from megatron_mesh.recurrence import SCHEMES, build_scheme

# Settings that have no counterpart among Hugging Face's fields, each with its check.
_OWN: dict[str, Callable[[Any], bool]] = {
    "vocab_size": lambda x: x is None or (type(x) is int and 1 <= x <= 2**31),
    "make_vocab_size_divisible_by": lambda x: type(x) is int and 1 <= x <= 2**20,
    "mesh_memory": lambda x: x in ("factored", "slots"),
    "router_init_std": lambda x: x is None or type(x) in (int, float),
    "router_bias_init": lambda x: type(x) in (int, float),
    "depth_scaled_init": lambda x: type(x) is bool,
}


def model_settings(config: dict[str, Any], directory: Path) -> ModelConfig:
    """Return the resolved model settings for a checked ``config.json`` in ``directory``.

    They come from Hugging Face's fields, and in our exports also from our own settings.

    Raises:
        UserError: our own settings in the export are damaged, or no model can have these settings.
    """
    base = own_settings(config)
    if read_omitted_rows(config, base, directory) is None:
        base = replace(base, vocab_size=config["vocab_size"])
    model = replace(
        base,
        **_recurrence(config),
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        ffn_hidden_size=config["intermediate_size"],
        seq_length=config["max_position_embeddings"],
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
        rotary_percent=rotary_percent(config),
        rotary_base=rotary_base(config),
        norm_epsilon=float(config.get("layer_norm_eps", 1e-5)),
        init_method_std=float(config.get("initializer_range", 0.02)),
        scale_embeddings=config["model_type"] != "gpt_neox" and config["embedding_scale"] != 1.0,
    )
    try:
        return resolve_model(model)
    except UserError as error:
        raise UserError(
            f"config.json describes a model that megatron_mesh doesn't support: {error}"
        ) from None


def own_settings(config: dict[str, Any]) -> ModelConfig:
    """Return the settings that only our exports have, with defaults for all others.

    Raises:
        UserError: the settings are damaged.
    """
    settings = config.get(SETTINGS_KEY, {})
    for name, fits in _OWN.items():
        if name in settings and not fits(settings[name]):
            raise UserError(
                f"config.json: {name} in {SETTINGS_KEY} has the invalid value {settings[name]!r}; export the "
                "model again"
            )
    return ModelConfig(**{name: settings[name] for name in _OWN if name in settings})


def _recurrence(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the recurrence scheme, its memory, and the layer layout."""
    if config["model_type"] == "gpt_neox":
        layers = LayerLayout(0, config["num_hidden_layers"], 1, 0, shared=False)
        return {"recurrence": "vanilla", "layers": str(layers)}
    scheme = SCHEMES[config["recurrence"]]
    names = ("prelude_layers", "core_layers", "num_loops", "coda_layers")
    prelude, core, loops, coda = (config[name] for name in names)
    layers = LayerLayout(prelude, core, loops, coda, scheme.shared_core)
    found = {"recurrence": config["recurrence"], "layers": str(layers)}
    if scheme.uses_memory:
        found |= {name: config[name] for name in ("mesh_slots", "mesh_transition_query")}
    return found


CoreInit = Literal["average", "first", "stepwise"]


def recursive_model(plain: ModelConfig, layers: str, recurrence: str) -> ModelConfig:
    """Return the resolved settings of a recursive model with the sizes of a plain one.

    Raises:
        UserError: ``plain`` already has a loop, the new model would have none, or the depths differ.
    """
    if SCHEMES[plain.recurrence].has_loop:
        raise UserError(
            f"--to-recursive needs a plain model, but this one already has a loop ({plain.recurrence})"
        )
    if recurrence in SCHEMES and not SCHEMES[recurrence].shared_core:
        raise UserError(
            f"--recurrence {recurrence} doesn't share its core; choose another, e.g. mesh or base"
        )
    target = parse_layers(layers)
    if not target.shared:
        raise UserError(f"--to-recursive {layers} has no loop; write prelude+coreRloops+coda, e.g. 4+8R2+4")
    if target.depth != layout(plain).depth:
        raise UserError(
            f"--to-recursive {layers} is {target.depth} layers deep, but the model has {layout(plain).depth} "
            "layers; choose a layout of that depth"
        )
    return resolve_model(replace(plain, recurrence=recurrence, layers=layers))


def core_sources(target: LayerLayout, choice: CoreInit) -> list[list[int]]:
    """Return, for each core layer, the layers of the plain model whose mean is its initial value.

    Args:
        target: layout of the recursive model.
        choice: "average" takes the layers at the same position in every loop; "first" takes the layer of the
            first loop; "stepwise" takes layers at equal distances from the first layer of all loops to the
            last.
    """
    loops, core, start = target.loops, target.core, target.prelude
    if choice == "average":
        return [[start + loop * core + index for loop in range(loops)] for index in range(core)]
    if choice == "first":
        return [[start + index] for index in range(core)]
    last = loops * core - 1
    return [[start + round(index * last / max(1, core - 1))] for index in range(core)]


def layer_sources(target: LayerLayout, choice: CoreInit) -> dict[str, list[list[int]]]:
    """Return the same for all layers, by the name of the part: prelude, core and coda."""
    first_of_coda = target.depth - target.coda
    return {
        "prelude": [[index] for index in range(target.prelude)],
        "core": core_sources(target, choice),
        "coda": [[first_of_coda + index] for index in range(target.coda)],
    }


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
    source, embedding = tensors.unfold(source, config_json.get(SETTINGS_KEY, {}), weights, *names)
    omitted = tensors.read_omitted_rows(config_json, own_settings(config_json), directory) or {}
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
    offline.write(save, boxes, dump_config(config), {**describe_state(start), "weights_only": True})
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
            return tensors.from_export(tensor, padded_vocab_size(model), omitted.get(entry.key))
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
