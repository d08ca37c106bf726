"""Reads and checks the settings of rotary position embeddings in a config.json.

transformers 4 reads ``rotary_emb_base`` and ``rotary_pct``. Version 5 reads ``rope_parameters`` and falls
back to those two. We reject a file that version 4 and version 5 would interpret differently, unless version 5
wrote it.
"""

from typing import Any

from megatron_mesh.errors import UserError
from megatron_mesh.hf.fields import short_json

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
