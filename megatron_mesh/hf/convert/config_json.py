"""Lists the fields of a config.json that cannot change logits, and formats values for error messages.

Reads and checks the settings of rotary position embeddings in a config.json.

transformers 4 reads ``rotary_emb_base`` and ``rotary_pct``. Version 5 reads ``rope_parameters`` and falls
back to those two. We reject a file that version 4 and version 5 would interpret differently, unless version 5
wrote it.

Reads the config.json of a Hugging Face model and rejects every model that we cannot reproduce exactly.

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
from megatron_mesh.recurrence import SCHEMES
from megatron_mesh.runtime import strict_json

_MAX_LENGTH = 60

HARMLESS = frozenset(
    {
        # Descriptions of the model and of the file.
        "architectures",
        "model_type",
        "transformers_version",
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "license",
        "dtype",
        "torch_dtype",
        "use_bfloat16",
        "custom_pipelines",
        "transformers.js_config",
        "transformers_tested",
        # Tokens.
        "tokenizer_class",
        "prefix",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "unk_token_id",
        "mask_token_id",
        # Heads of other tasks, and training by other libraries.
        "finetuning_task",
        "task_specific_params",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "tf_legacy_loss",
        "gradient_checkpointing",
        # Outputs of forward(), and its kernels.
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "tie_last_hidden_states",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "experts_implementation",
        # GPT-NeoX reads these in no supported version.
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        # Defaults of generate().
        "max_length",
        "min_length",
        "max_new_tokens",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
    }
)
"""Fields that don't change the logits of a GPT-NeoX, whatever their values."""


def short_json(value: Any) -> str:
    """Return a value as JSON, truncated for an error message."""
    text = strict_json.dumps(value)
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."


_LARGEST_BASE = 2**53  # above this, float64 cannot represent every integer
_NAMES = {
    # name in rope_parameters: (name in transformers 4, default in both, a name that neither reads)
    "rope_theta": ("rotary_emb_base", 10000, "rope_theta"),
    "partial_rotary_factor": ("rotary_pct", 0.25, "partial_rotary_factor"),
}


def rotary_base(config: dict[str, Any]) -> int:
    """Return the RoPE base of a checked configuration."""
    return int(_value(config, "rope_theta"))


def rotary_percent(config: dict[str, Any]) -> float:
    """Return the fraction of each head's dimensions that is rotated."""
    return float(_value(config, "partial_rotary_factor"))


def check_rope(config: dict[str, Any]) -> None:
    """Raise UserError if RoPE is scaled, or if its settings contradict each other or are out of range.

    Args:
        config: contents of config.json, whose sizes must have been checked.
    """
    rope = config.get("rope_parameters")
    if rope is not None and not isinstance(rope, dict):
        raise UserError(f"rope_parameters is {short_json(rope)}, but must be an object")
    for name, value in (rope or {}).items():
        if name not in _NAMES and not (name in ("type", "rope_type") and value == "default"):
            raise UserError(
                f"rope_parameters sets {name} to {short_json(value)}; only models without RoPE scaling can "
                "be converted"
            )
    base = _value(config, "rope_theta")
    if not 1 <= base <= _LARGEST_BASE or int(base) != base:
        raise UserError(
            f"rope_theta (or rotary_emb_base) is {short_json(base)}; only whole numbers from 1 to 2^53 can "
            "be converted"
        )
    _check_fraction(
        _value(config, "partial_rotary_factor"), config["hidden_size"], config["num_attention_heads"]
    )


def _check_fraction(fraction: float, hidden: int, heads: int) -> None:
    name = "partial_rotary_factor (or rotary_pct)"
    if not 0 < fraction <= 1:
        raise UserError(f"{name} is {short_json(fraction)}, but must be above 0 and at most 1")
    rotated = int(hidden // heads * fraction)
    if rotated < 2 or rotated % 2:
        raise UserError(
            f"{name} {short_json(fraction)} rotates {rotated} of the {hidden // heads} dimensions of a head; "
            "only models that rotate an even number can be converted"
        )


def _value(config: dict[str, Any], name: str) -> float:
    """Return the value of a setting, which must be the same under every name that the file has for it."""
    legacy, default, unread = _NAMES[name]
    rope = config.get("rope_parameters") or {}
    values = {f"rope_parameters.{name}": rope[name]} if name in rope else {}
    if legacy in config or not values or not _written_by_version_5(config):
        values[legacy] = config.get(legacy, default)
    if unread in config:
        values[unread] = config[unread]
    for spelling, value in values.items():
        if type(value) not in (int, float):
            raise UserError(f"{spelling} is {short_json(value)}, but must be a number")
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{spelling} {short_json(value)}" for spelling, value in values.items())
        raise UserError(f"{listed}: versions of transformers read different ones of these; make them equal")
    return next(iter(values.values()))


def _written_by_version_5(config: dict[str, Any]) -> bool:
    major = str(config.get("transformers_version")).partition(".")[0]
    return major.isdecimal() and int(major) >= 5


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
