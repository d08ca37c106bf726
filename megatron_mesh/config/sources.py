"""The sources of settings: reading YAML files, and letting a later source override an earlier one."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from megatron_mesh.config.layout import parse_layers
from megatron_mesh.config.settings import NEGATED, SETTINGS, unknown_setting
from megatron_mesh.config.yaml_file import expand_path, file_or_preset, load_yaml
from megatron_mesh.errors import UserError

LAYER_SETTINGS = {
    "prelude_layers": "prelude",
    "core_layers": "core",
    "num_loops": "loops",
    "coda_layers": "coda",
}
"""Settings that each give one field of ``LayerLayout``."""

ALTERNATIVES: tuple[tuple[set[str], set[str]], ...] = (
    ({"layers"}, set(LAYER_SETTINGS)),
    ({"train_iters"}, {"train_samples"}),
    ({"lr_decay_iters"}, {"lr_decay_samples"}),
    ({"lr_warmup_iters"}, {"lr_warmup_fraction", "lr_warmup_samples"}),
    ({"lr_warmup_samples"}, {"lr_warmup_fraction"}),
    ({"lr_wsd_decay_iters"}, {"lr_wsd_decay_samples"}),
    ({"data_path"}, {"train_data_path", "valid_data_path", "test_data_path"}),
)
"""Pairs of alternatives. If a source gives one, it removes the other from earlier sources; ``resolve``
refuses both in one source. All these settings are None unless given."""

DESCRIBES: tuple[tuple[str, str], ...] = (("tokenizer_model", "tokenizer_type"),)
"""Pairs of a setting and one that describes it. If a source gives the first, it removes the second from
earlier sources."""

ALTERNATIVE_NAMES = frozenset().union(*(names for pair in ALTERNATIVES for names in pair), *DESCRIBES)

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
"""Settings in which a YAML file may contain ~ and $VAR, as a command line may in a shell."""


def merge(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the settings of two sources; the later one takes precedence.

    A setting such as ``num_loops`` in the later source changes one number of ``layers`` in the earlier one.
    """
    kept = dict(earlier)
    if earlier.get("layers") and "layers" not in later and 0 < len(LAYER_SETTINGS.keys() & later) < 4:
        kept["layers"] = _change_layers(earlier["layers"], later)
        later = {name: value for name, value in later.items() if name not in LAYER_SETTINGS}
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
            f"layers {layers} is a plain depth without prelude, core and coda; give --layers, or all of "
            "--prelude-layers, --core-layers, --num-loops and --coda-layers"
        )
    changes = {LAYER_SETTINGS[name]: parts[name] for name in LAYER_SETTINGS.keys() & parts}
    return str(replace(parse_layers(layers), **changes))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of flat keys, and convert its values to the types of the schema.

    Raises:
        UserError: the file can't be read or has another form, a key is unknown or given twice (also as ``x``
            and ``no_x``), or a value has the wrong type.
    """
    settings: dict[str, Any] = {}
    for key, value in _load(path).items():
        name = NEGATED.get(key, key)
        if name not in SETTINGS:
            raise UserError(f"{path}: {unknown_setting(str(key), [*SETTINGS, *NEGATED], str)}")
        try:
            converted = _convert(value, SETTINGS[name].type)
        except ValueError:
            expected = _describe_type(SETTINGS[name].type)
            raise UserError(f"{path}: {key}: expected {expected}, got {value!r}") from None
        if name in settings:
            raise UserError(f"{path}: {name} and no_{name} are both given; keep one")
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
    """Convert a YAML value to the type of a field. Raise ValueError if that isn't possible.

    Numbers and text are converted to each other, because YAML 1.1 reads ``1e-3`` as text and ``24`` as a
    number.
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


def _describe_type(wanted: Any) -> str:
    """Describe the type of a setting in words."""
    origin, options = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return f"{_describe_type(_not_none(wanted))}, or null"
    if origin is Literal:
        return "one of " + ", ".join(options)
    if origin is list:
        return f"a list of items, each {_describe_type(options[0])}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[wanted]


def _not_none(wanted: Any) -> Any:
    return next(option for option in get_args(wanted) if option is not NoneType)
