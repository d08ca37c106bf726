"""Derives our model settings from the config.json of a Hugging Face directory."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_mesh.config.layout import LayerLayout
from megatron_mesh.config.resolve.model import resolve_model
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert.describe import SETTINGS_KEY
from megatron_mesh.hf.rope import rotary_base, rotary_percent
from megatron_mesh.hf.vocabulary import read_omitted_rows
from megatron_mesh.recurrence import SCHEMES

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
