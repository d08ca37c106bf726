"""Settings of the model in a Hugging Face directory."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron_mesh.config.check_model import resolve_model
from megatron_mesh.config.layers import LayerLayout
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.errors import UserError
from megatron_mesh.hf.describe import SETTINGS_KEY
from megatron_mesh.hf.vocabulary import is_of_training
from megatron_mesh.recurrence import SCHEMES

# What config.json must say, whoever wrote it.
_NEEDED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
# What the model must have to be ours, with what an absent entry of config.json means.
_REQUIRED = {
    "use_parallel_residual": (True, True),
    "attention_bias": (True, True),
    "hidden_act": ("gelu", "gelu"),
    "rope_scaling": (None, None),
}


def read_config(directory: Path) -> dict[str, Any]:
    """Contents of ``directory/config.json``.

    Raises:
        UserError: it is not there, not readable, or not of a GPT-NeoX or of an export of ours.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a Hugging Face model's directory") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object; give a Hugging Face model's directory")
    kind = config.get("model_type")
    if kind not in ("gpt_neox", "megatron_mesh"):
        raise UserError(
            f"{path} is of a {kind} model; only gpt_neox (Pythia) and megatron_mesh can be converted"
        )
    if absent := [name for name in _NEEDED if name not in config]:
        raise UserError(f"{path} lacks {', '.join(absent)}; get the model anew")
    for name, (wanted, default) in _REQUIRED.items():
        if (found := config.get(name, default)) != wanted:
            raise UserError(
                f"{path}: {name} is {found}, and models here have {wanted}; it cannot be converted"
            )
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{path}: rope_type is {rope['rope_type']}, and models here have the default one")
    return config


def model_settings(config: dict[str, Any]) -> ModelConfig:
    """The resolved settings of the model of a ``config.json``.

    What Hugging Face's entries say counts; what they cannot say comes from our own, where the directory is
    an export of ours.
    """
    known = {field.name for field in fields(ModelConfig)}
    ours = {name: value for name, value in config.get(SETTINGS_KEY, {}).items() if name in known}
    base = ModelConfig(**ours)
    rope = config.get("rope_parameters") or {}
    if not is_of_training(config, base):
        vocabulary = config["vocab_size"]
        divisor = next(n for n in (128, 64, 32, 16, 8, 4, 2, 1) if vocabulary % n == 0)
        base = replace(base, vocab_size=vocabulary, make_vocab_size_divisible_by=divisor)
    model = replace(
        base,
        recurrence=config.get("recurrence", "vanilla"),
        layers=str(_layers(config)),
        mesh_slots=config.get("mesh_slots") if _has_memory(config) else None,
        mesh_transition_query=config.get("mesh_transition_query", base.mesh_transition_query),
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        ffn_hidden_size=config["intermediate_size"],
        seq_length=config["max_position_embeddings"],
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
        rotary_percent=rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25)),
        rotary_base=int(rope.get("rope_theta", config.get("rotary_emb_base", 10000))),
        norm_epsilon=config.get("layer_norm_eps", 1e-5),
        init_method_std=config.get("initializer_range", 0.02),
        scale_embeddings=config.get("embedding_scale", 1.0) != 1.0,
    )
    return resolve_model(model)


def _has_memory(config: dict[str, Any]) -> bool:
    return SCHEMES[config.get("recurrence", "vanilla")].uses_memory


def _layers(config: dict[str, Any]) -> LayerLayout:
    if config["model_type"] == "gpt_neox":
        return LayerLayout(0, config["num_hidden_layers"], 1, 0, shared=False)
    shared = SCHEMES[config["recurrence"]].shared_core
    names = ("prelude_layers", "core_layers", "num_loops", "coda_layers")
    prelude, core, loops, coda = (config[name] for name in names)
    return LayerLayout(prelude, core, loops, coda, shared)
