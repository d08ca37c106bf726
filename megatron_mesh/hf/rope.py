"""Rotary position embedding in a config.json.

transformers 4 reads ``rotary_emb_base`` and ``rotary_pct``. Version 5 reads ``rope_parameters`` and falls
back to those two. A file that says one thing to version 4 and another to version 5 is refused, unless version
5 wrote it: then its reading counts.
"""

from typing import Any

from megatron_mesh.errors import UserError
from megatron_mesh.hf.fields import shown

_LARGEST_BASE = 2**53  # beyond it, floating point does not tell whole numbers apart
_NAMES = {
    # in rope_parameters: in transformers 4, the default of both, and an attribute that neither reads
    "rope_theta": ("rotary_emb_base", 10000, "rope_theta"),
    "partial_rotary_factor": ("rotary_pct", 0.25, "partial_rotary_factor"),
}


def rotary_base(config: dict[str, Any]) -> int:
    """Return the base period of a checked configuration."""
    return int(_value(config, "rope_theta"))


def rotary_percent(config: dict[str, Any]) -> float:
    """Return the share of each head's dimensions that is rotated."""
    return float(_value(config, "partial_rotary_factor"))


def check_rope(config: dict[str, Any]) -> None:
    """Raise UserError if positions are scaled, or the settings contradict each other or are out of range.

    Args:
        config: contents of config.json, its sizes checked.
    """
    rope = config.get("rope_parameters")
    if rope is not None and not isinstance(rope, dict):
        raise UserError(f"rope_parameters is {shown(rope)}, and must be an object")
    for name, value in (rope or {}).items():
        if name not in _NAMES and not (name in ("type", "rope_type") and value == "default"):
            raise UserError(
                f"rope_parameters has {name} {shown(value)}; only models without RoPE scaling can be "
                "converted"
            )
    base = _value(config, "rope_theta")
    if not 1 <= base <= _LARGEST_BASE or int(base) != base:
        raise UserError(
            f"rope_theta (or rotary_emb_base) is {shown(base)}; only whole numbers from 1 to 2^53 can be "
            "converted"
        )
    _check_percent(
        _value(config, "partial_rotary_factor"), config["hidden_size"], config["num_attention_heads"]
    )


def _check_percent(share: float, hidden: int, heads: int) -> None:
    name = "partial_rotary_factor (or rotary_pct)"
    if not 0 < share <= 1:
        raise UserError(f"{name} is {shown(share)}, and must be above 0 and at most 1")
    turned = int(hidden // heads * share)
    if turned < 2 or turned % 2:
        raise UserError(
            f"{name} {shown(share)} rotates {turned} of a head's {hidden // heads} dimensions; only an even "
            "number of them can be converted"
        )


def _value(config: dict[str, Any], name: str) -> float:
    """Return the value of a setting, once every version of transformers that counts reads the same."""
    legacy, default, unread = _NAMES[name]
    rope = config.get("rope_parameters") or {}
    said = {f"rope_parameters.{name}": rope[name]} if name in rope else {}
    if legacy in config or not said or not _written_by_version_5(config):
        said[legacy] = config.get(legacy, default)
    if unread in config:
        said[unread] = config[unread]
    for spelling, value in said.items():
        if type(value) not in (int, float):
            raise UserError(f"{spelling} is {shown(value)}, and must be a number")
    if len(set(said.values())) > 1:
        values = ", ".join(f"{spelling} {shown(value)}" for spelling, value in said.items())
        raise UserError(f"{values}: versions of transformers read different ones; make them equal")
    return next(iter(said.values()))


def _written_by_version_5(config: dict[str, Any]) -> bool:
    major = str(config.get("transformers_version")).partition(".")[0]
    return major.isdecimal() and int(major) >= 5
