"""Where settings come from: YAML files, and how a later source overrides an earlier one."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from megatron_mesh.config.layers import parse_layers
from megatron_mesh.config.settings import NEGATED, SETTINGS, unknown_setting
from megatron_mesh.config.yaml_file import expand_path, file_or_preset, load_yaml
from megatron_mesh.errors import UserError

# The setting of each part of a LayerLayout.
LAYER_PARTS = {
    "prelude_layers": "prelude",
    "core_layers": "core",
    "num_loops": "loops",
    "coda_layers": "coda",
}

# Two ways to say one thing. A source that takes one way drops what an earlier source said the other
# way; one source that takes both is refused by ``resolve``. All of these are None unless given.
ALTERNATIVES: tuple[tuple[set[str], set[str]], ...] = (
    ({"layers"}, set(LAYER_PARTS)),
    ({"train_iters"}, {"train_samples"}),
    ({"lr_decay_iters"}, {"lr_decay_samples"}),
    ({"lr_warmup_iters"}, {"lr_warmup_fraction", "lr_warmup_samples"}),
    ({"lr_warmup_samples"}, {"lr_warmup_fraction"}),
    ({"lr_wsd_decay_iters"}, {"lr_wsd_decay_samples"}),
    ({"data_path"}, {"train_data_path", "valid_data_path", "test_data_path"}),
)

# A source that gives the first drops what an earlier source said of the second, which described it.
DESCRIBES: tuple[tuple[str, str], ...] = (("tokenizer_model", "tokenizer_type"),)
ALTERNATIVE_NAMES = frozenset().union(*(names for pair in ALTERNATIVES for names in pair), *DESCRIBES)

# Settings in which a YAML file may write ~ and $VAR, as a shell lets the command line do.
PATHS = frozenset(
    {
        "data_path",
        "train_data_path",
        "valid_data_path",
        "test_data_path",
        "data_cache_path",
        "tokenizer_model",
        "save",
        "load",
        "output_dir",
        "tensorboard_dir",
    }
)


def merge(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of two sources, the later one's first.

    A part of the layers (say ``num_loops``) given after a whole ``layers`` changes that part of it.
    """
    kept = dict(earlier)
    if earlier.get("layers") and "layers" not in later and 0 < len(LAYER_PARTS.keys() & later) < 4:
        kept["layers"] = _change_layers(earlier["layers"], later)
        later = {name: value for name, value in later.items() if name not in LAYER_PARTS}
    for one, other in ALTERNATIVES:
        if one & later.keys():
            kept = {name: value for name, value in kept.items() if name not in other}
        if other & later.keys():
            kept = {name: value for name, value in kept.items() if name not in one}
    for thing, description in DESCRIBES:
        if thing in later:
            kept.pop(description, None)
    return {**kept, **later}


def _change_layers(layers: str, parts: Mapping[str, Any]) -> str:
    if layers.strip().isdecimal():
        raise UserError(
            f"layers {layers} is a plain depth, of which no part can be changed; give --layers anew, or "
            "all of --prelude-layers, --core-layers, --num-loops and --coda-layers"
        )
    changes = {LAYER_PARTS[name]: parts[name] for name in LAYER_PARTS.keys() & parts}
    return str(replace(parse_layers(layers), **changes))


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file of flat keys, converted to the types of the schema.

    Raises:
        UserError: the file cannot be read or is not such a file, a key is unknown or given twice
            (as ``x`` and ``no_x``), or a value has another type.
    """
    settings: dict[str, Any] = {}
    for key, value in _load(path).items():
        name = NEGATED.get(key, key)
        if name not in SETTINGS:
            raise UserError(f"{path}: {unknown_setting(str(key), [*SETTINGS, *NEGATED], str)}")
        try:
            converted = _convert(value, SETTINGS[name].type)
        except ValueError:
            expected = describe(SETTINGS[name].type)
            raise UserError(f"{path}: {key}: expected {expected}, got {value!r}") from None
        if name in settings:
            raise UserError(f"{path}: {name} and no_{name} are both given; keep one of them")
        if name in PATHS:
            converted = _expanded(converted, path, name)
        settings[name] = not converted if key in NEGATED else converted
    return settings


def _load(path: Path) -> dict[Any, Any]:
    try:
        content = load_yaml(file_or_preset(path))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--config {path} is not a YAML file of settings: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold lines of the form 'hidden_size: 768'")
    return content


def _expanded(value: str | list[str] | None, file: Path, name: str) -> str | list[str] | None:
    try:
        if isinstance(value, list):
            return [expand_path(word) for word in value]
        return None if value is None else expand_path(value)
    except ValueError as error:
        raise UserError(f"{file}: {name}: {value}: {error}") from None


def _convert(value: Any, wanted: Any) -> Any:
    """``value``, as YAML read it, in the type of a field; ValueError if it is of another kind.

    YAML 1.1 reads ``1e-3`` as text and ``24`` as a number, so numbers and text go over into each other.
    """
    origin, options = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return None if value is None else _convert(value, _not_none(wanted))
    if origin is list:
        return [_convert(item, options[0]) for item in (value if isinstance(value, list) else [value])]
    if origin is Literal or wanted is bool:
        if value not in (options or (True, False)) or (wanted is bool and not isinstance(value, bool)):
            raise ValueError(value)
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(value)
    if wanted is int and not isinstance(value, int):
        if not float(value).is_integer():
            raise ValueError(value)
        return int(float(value))
    return wanted(value)


def describe(wanted: Any) -> str:
    """The type of a setting in words."""
    origin, options = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return f"{describe(_not_none(wanted))}, or null"
    if origin is Literal:
        return "one of " + ", ".join(options)
    if origin is list:
        return f"a list of items, each {describe(options[0])}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[wanted]


def _not_none(wanted: Any) -> Any:
    return next(option for option in get_args(wanted) if option is not NoneType)
