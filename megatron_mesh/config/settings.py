"""All settings by name. Names are unique across groups, so flags and YAML keys are flat.

Range checks of single settings.

Reading YAML files, and expanding paths in them like a shell.

The sources of settings: reading YAML files, and letting a later source override an earlier one.

Writing the resolved configuration as a YAML file that ``--config`` reads back.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from string import Template
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_mesh.config.layout import parse_layers
from megatron_mesh.config.schema import Config
from megatron_mesh.errors import UserError


@dataclass(frozen=True)
class Setting:
    """A setting's group in ``Config`` and its type."""

    group: str
    type: Any


SETTINGS: dict[str, Setting] = {
    name: Setting(group, type_)
    for group, cls in get_type_hints(Config).items()
    for name, type_ in get_type_hints(cls).items()
}

NEGATED: dict[str, str] = {f"no_{name}": name for name, s in SETTINGS.items() if s.type is bool}
"""``no_<name>`` sets a boolean to false, on the command line and in YAML."""

REFUSED: dict[str, str] = {
    "cpu_offloading": "offloading of activations relies on every layer running once, but the core runs K "
    "times; to save memory use --recompute-granularity",
    "fp16": "float16 needs loss scaling, which is not implemented; use --bf16",
    "num_layers_per_virtual_pipeline_stage": "the virtual stages of a looped model are its K+2 passes; for "
    "vanilla use --num-virtual-stages-per-pipeline-rank",
    "virtual_pipeline_model_parallel_size": "the virtual stages of a looped model are its K+2 passes; for "
    "vanilla use --num-virtual-stages-per-pipeline-rank",
    "decoder_first_pipeline_num_layers": "use --pipeline-model-parallel-layout",
    "decoder_last_pipeline_num_layers": "use --pipeline-model-parallel-layout",
    "num_layers": "use --layers: one number for a plain model, 4+8R2+4 for a core that runs twice",
    "hidden_dropout": "the model has no dropout",
    "attention_dropout": "the model has no dropout",
    "decrease_batch_size_if_needed": "START and INCREMENT of --rampup-batch-size must be multiples of "
    "--micro-batch-size x data-parallel size",
}
"""Settings of Megatron-LM that are unsupported on purpose, with the reason. Longer names that start with one
of these are unsupported too."""


def flag(name: str) -> str:
    """Return the flag of a setting: ``--hidden-size`` for ``hidden_size``."""
    return "--" + name.replace("_", "-")


def flatten(config: Config) -> dict[str, Any]:
    """Return the value of every setting by name, in the order of the schema."""
    return {name: getattr(getattr(config, s.group), name) for name, s in SETTINGS.items()}


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a copy of ``config`` with the named settings replaced."""
    by_group: dict[str, dict[str, Any]] = {group.name: {} for group in fields(Config)}
    for name, value in values.items():
        by_group[SETTINGS[name].group][name] = value
    return Config(**{g: replace(getattr(config, g), **changes) for g, changes in by_group.items()})


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to ``name``, or None if none is similar."""
    return next(iter(get_close_matches(name, list(known), n=1)), None)


def unknown_setting(name: str, known: Iterable[str], spell: Callable[[str], str]) -> UserError:
    """Return the error for an unknown setting: why it isn't supported, or else the most similar known one.

    Args:
        name: the name with underscores, as in ``SETTINGS``.
        known: the names that are accepted in its place.
        spell: converts a name to the spelling that the user sees, e.g. ``flag``.
    """
    for refused, reason in REFUSED.items():
        if name == refused or name.startswith(f"{refused}_"):
            return UserError(f"{spell(name)} is not supported: {reason}")
    near = nearest(name, known)
    hint = f"did you mean {spell(near)}?" if near else "--help lists all settings"
    return UserError(f"unknown setting {spell(name)}; {hint}")


def at_least(minimum: float, group: Any, *names: str) -> None:
    """Raise UserError unless each named setting is unset, or finite and at least ``minimum``."""
    for name in names:
        value = getattr(group, name)
        if value is not None and not minimum <= value < math.inf:
            raise UserError(f"{flag(name)} {value} is out of range; it must be at least {minimum}")


def positive(group: Any, *names: str) -> None:
    """Raise UserError unless each named setting is unset, or finite and above 0."""
    for name in names:
        value = getattr(group, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{flag(name)} {value} is out of range; it must be above 0")


def fraction(group: Any, *names: str, below_one: bool = False) -> None:
    """Raise UserError unless each named setting is unset or in [0, 1]; in [0, 1) if ``below_one``."""
    for name in names:
        value = getattr(group, name)
        if value is not None and not (0 <= value <= 1 and (value < 1 or not below_one)):
            bounds = "at least 0 and below 1" if below_one else "between 0 and 1"
            raise UserError(f"{flag(name)} {value} is out of range; it must be {bounds}")


def load_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        OSError: the file can't be read.
        ValueError: it isn't UTF-8 or YAML, or has duplicate keys (of which PyYAML would take the last).
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def file_or_preset(path: Path) -> Path:
    """Return ``path``, or the preset of that name (``pythia-1.4b``) if there is no such file."""
    package = Path(__file__).resolve().parents[1]
    if len(path.parts) == 1 and not path.exists():
        for folder in (package / "presets", package.parent / "examples/configs"):  # in a wheel, in a clone
            if (preset := folder / f"{path}.yaml").is_file():
                return preset
    return path


_MERGE = "tag:yaml.org,2002:merge"


class _UniqueKeys(yaml.SafeLoader):
    """Rejects duplicate keys and names their lines."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _MERGE:
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in lines:
                raise yaml.YAMLError(f"{key} is given twice, in lines {lines[key]} and {line}; keep one")
            lines[key] = line
        return super().construct_mapping(node, deep)


def expand_path(text: str) -> str:
    """Expand ``~``, ``$VAR`` and ``${VAR}`` as a shell does. ``$$`` is a literal ``$``.

    Raises:
        ValueError: a variable isn't set, or a ``$`` isn't followed by a name.
    """
    try:
        return expand_user(Template(text).substitute(os.environ))
    except KeyError as error:
        raise ValueError(f"the environment variable {error.args[0]} is not set") from None
    except ValueError:
        raise ValueError(
            "a $ must be followed by the name of a variable, e.g. $HOME; write $$ for a literal $"
        ) from None


def expand_user(text: str) -> str:
    """Expand a leading ``~``, also in NAME=PATH."""
    name, equals, path = text.partition("=")
    return name + equals + os.path.expanduser(path) if path.startswith("~") else os.path.expanduser(text)


def escape_path(text: str) -> str:
    """Escape every ``$`` for ``expand_path``."""
    return text.replace("$", "$$")


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


def dump_config(config: Config) -> str:
    """Return all settings as flat YAML that ``--config`` reads back, with a comment above each group."""
    groups = asdict(config)
    for settings in groups.values():
        settings.update({name: _escaped(settings[name]) for name in PATHS & settings.keys()})
    return "\n".join(
        f"# {group}\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}"
        for group, settings in groups.items()
    )


def _escaped(value: str | list[str] | None) -> str | list[str] | None:
    """Escape a path, or several, so that reading the file doesn't expand it."""
    if isinstance(value, list):
        return [escape_path(word) for word in value]
    return None if value is None else escape_path(value)
