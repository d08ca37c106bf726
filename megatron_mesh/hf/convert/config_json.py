"""Reads the config.json of a Hugging Face model and rejects every model that we cannot reproduce exactly.

The check is an allow-list: each field must be known, have the right type, and have a value that our model
supports. If we ignored unknown fields, one of them could change what transformers computes, and the converted
model would silently differ from its source.
"""

import json
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert.describe import SETTINGS_KEY
from megatron_mesh.hf.fields import HARMLESS, short_json
from megatron_mesh.hf.rope import check_rope
from megatron_mesh.recurrence import SCHEMES

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_LOOP_SIZES = {
    "prelude_layers": 0,
    "core_layers": 1,
    "num_loops": 1,
    "trained_loops": 1,
    "coda_layers": 0,
    "mesh_slots": 1,
}
"""Fields that only our recursive models have, and their smallest values."""
_LARGEST_SIZE, _LARGEST_LOOP_SIZE = 2**31 - 1, 4096
_LOOP_FIELDS = (*_LOOP_SIZES, "recurrence", "mesh_transition_query", "embedding_scale")
# Fields with only one supported value, which is also transformers' default for an absent field.
_FIXED = {
    "hidden_act": "gelu",
    "use_parallel_residual": True,
    "attention_bias": True,
    "rope_scaling": None,
    "quantization_config": None,
    "pruned_heads": {},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "torchscript": False,
}
_FRACTIONS = ("hidden_dropout", "attention_dropout", "classifier_dropout")
_ROPE = ("rope_parameters", "rotary_pct", "rotary_emb_base", "rope_theta", "partial_rotary_factor")
_OURS = "megatron_mesh"
"""Model type of our recursive models, and prefix of the fields that only our exports have."""


def read_config(directory: Path) -> dict[str, Any]:
    """Read and check ``directory/config.json``.

    Raises:
        UserError: the file is missing or not valid JSON, or it describes a model that we cannot reproduce
            exactly, such as one that is neither a GPT-NeoX nor one of our exports.
    """
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} contains a PEFT adapter (adapter_config.json); merge it into its model and convert "
            "the merged model"
        )
    path = directory / "config.json"
    config = _read_json(path)
    try:
        _check_kind(config)
        _check_sizes(config)
        _check_values(config)
        _check_known(config)
        check_rope(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def dropout_note(config: dict[str, Any]) -> str | None:
    """Return a note about the source's dropout, which the conversion drops; None if there is no dropout."""
    rates = [f"{name} {config[name]}" for name in _FRACTIONS[:2] if config.get(name)]
    if not rates:
        return None
    return f"ignored {' and '.join(rates)}: megatron_mesh models have no dropout"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_float=_finite, parse_constant=_finite
        )
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({error}); give the directory of a Hugging Face model") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object; give the directory of a Hugging Face model")
    return config


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} occurs twice")
    return found


def _finite(text: str) -> float:
    if not isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def _check_kind(config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if kind not in ("gpt_neox", _OURS):
        raise UserError(
            f"model_type is {short_json(kind)}; only gpt_neox models such as Pythia, and {_OURS} models, can "
            "be converted"
        )
    if kind == "gpt_neox" and config.get("auto_map") is not None:
        raise UserError(
            "auto_map refers to custom code, which may differ from GPT-NeoX; remove it if stock GPT-NeoX "
            "gives the same output"
        )
    needed = (*_SIZES, *_LOOP_FIELDS) if kind == _OURS else _SIZES
    if missing := [name for name in needed if name not in config]:
        raise UserError(f"missing fields: {', '.join(missing)}; download or export the model again")


def _check_sizes(config: dict[str, Any]) -> None:
    for name in _SIZES:
        if type(config[name]) is not int or not 1 <= config[name] <= _LARGEST_SIZE:
            raise _wrong(name, config[name], f"a whole number from 1 to {_LARGEST_SIZE}")
    for name, least in _LOOP_SIZES.items() if config["model_type"] == _OURS else ():
        if type(config[name]) is not int or not least <= config[name] <= _LARGEST_LOOP_SIZE:
            raise _wrong(name, config[name], f"a whole number from {least} to {_LARGEST_LOOP_SIZE}")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if hidden % heads:
        raise UserError(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}")
    if config.get("head_dim", hidden // heads) != hidden // heads:
        raise _wrong("head_dim", config["head_dim"], f"hidden_size / num_attention_heads = {hidden // heads}")


def _check_values(config: dict[str, Any]) -> None:
    for name, wanted in _FIXED.items():
        value = config.get(name, wanted)
        if type(value) is not type(wanted) or value != wanted:
            raise UserError(
                f"{name} is {short_json(value)}; only models with {short_json(wanted)} can be converted"
            )
    _check_number(config, "layer_norm_eps", "a number above 0 and up to 1", lambda x: 0 < x <= 1)
    _check_number(config, "initializer_range", "a number from 0 to 1", lambda x: 0 <= x <= 1)
    for name in _FRACTIONS:
        # classifier_dropout is only used by classification heads, and is null in old files.
        if name in config and not (name == "classifier_dropout" and config[name] is None):
            _check_number(config, name, "a number from 0 to 1", lambda x: 0 <= x <= 1)
    if type(config.get("tie_word_embeddings", False)) is not bool:
        raise _wrong("tie_word_embeddings", config["tie_word_embeddings"], "true or false")
    if not isinstance(config.get(SETTINGS_KEY, {}), dict):
        raise _wrong(SETTINGS_KEY, config[SETTINGS_KEY], "an object")
    if config["model_type"] == _OURS:
        _check_loop(config)


def _check_loop(config: dict[str, Any]) -> None:
    looped = [name for name, scheme in SCHEMES.items() if scheme.has_loop]
    if config["recurrence"] not in looped:
        raise _wrong("recurrence", config["recurrence"], f"one of {', '.join(looped)}")
    queries = ("prelude-output", "embedding")
    if config["mesh_transition_query"] not in queries:
        raise _wrong("mesh_transition_query", config["mesh_transition_query"], f"one of {', '.join(queries)}")
    root = config["hidden_size"] ** 0.5
    text = f"1 or the square root of hidden_size, {root}"
    _check_number(config, "embedding_scale", text, lambda x: x in (1.0, root))


def _check_known(config: dict[str, Any]) -> None:
    known = {*_SIZES, *_FIXED, *_FRACTIONS, *_ROPE, *HARMLESS}
    known |= {"auto_map", "head_dim", "layer_norm_eps", "initializer_range", "tie_word_embeddings"}
    if config["model_type"] == _OURS:
        known |= set(_LOOP_FIELDS)
    for name, value in config.items():
        if name not in known and not name.startswith(_OURS) and value is not None:
            raise UserError(
                f"{name} ({short_json(value)}) is an unknown field; remove it if it doesn't change what the "
                "model computes"
            )


def _check_number(config: dict[str, Any], name: str, wanted: str, fits: Callable[[float], bool]) -> None:
    value: Any = config.get(name)
    if name in config and (type(value) not in (int, float) or not fits(value)):
        raise _wrong(name, value, wanted)


def _wrong(name: str, value: Any, wanted: str) -> UserError:
    return UserError(f"{name} is {short_json(value)}, but must be {wanted} for a conversion")
