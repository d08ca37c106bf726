"""The settings by name. Names are unique over all groups, so flags and YAML keys are flat."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, get_type_hints

from megatron_mesh.config.schema import Config
from megatron_mesh.errors import UserError


@dataclass(frozen=True)
class Setting:
    """Where a setting stands in ``Config``, and its annotated type."""

    group: str
    type: Any


SETTINGS: dict[str, Setting] = {
    name: Setting(group, type_)
    for group, cls in get_type_hints(Config).items()
    for name, type_ in get_type_hints(cls).items()
}

# ``no_<name>`` sets a boolean to false, on the command line and in YAML.
NEGATED: dict[str, str] = {f"no_{name}": name for name, s in SETTINGS.items() if s.type is bool}

# Settings of Megatron-LM that are left out on purpose; those that only begin with the name count too.
REFUSED: dict[str, str] = {
    "cpu_offloading": "offloading of activations counts on every layer running once, and the core runs K "
    "times; to save memory use --recompute-granularity",
    "fp16": "half precision needs loss scaling, which is not built in; use --bf16",
    "num_layers_per_virtual_pipeline_stage": "a looped model has its K+2 passes as virtual stages; for "
    "vanilla use --num-virtual-stages-per-pipeline-rank",
    "virtual_pipeline_model_parallel_size": "a looped model has its K+2 passes as virtual stages; for "
    "vanilla use --num-virtual-stages-per-pipeline-rank",
    "decoder_first_pipeline_num_layers": "use --pipeline-model-parallel-layout",
    "decoder_last_pipeline_num_layers": "use --pipeline-model-parallel-layout",
    "num_layers": "use --layers: one number for a plain model, 4+8R2+4 for a core that runs twice",
    "hidden_dropout": "the model has no dropout",
    "attention_dropout": "the model has no dropout",
    "decrease_batch_size_if_needed": "START and INCREMENT of --rampup-batch-size must be multiples of "
    "--micro-batch-size x data-parallel size",
}


def flag(name: str) -> str:
    """``hidden_size`` -> ``--hidden-size``."""
    return "--" + name.replace("_", "-")


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by name, in the order of the schema."""
    return {name: getattr(getattr(config, s.group), name) for name, s in SETTINGS.items()}


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of ``config`` with the named settings replaced (KeyError for a name that is none)."""
    by_group: dict[str, dict[str, Any]] = {group.name: {} for group in fields(Config)}
    for name, value in values.items():
        by_group[SETTINGS[name].group][name] = value
    return Config(**{g: replace(getattr(config, g), **changes) for g, changes in by_group.items()})


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like ``name``, or None if none is near."""
    return next(iter(get_close_matches(name, list(known), n=1)), None)


def unknown_setting(name: str, known: Iterable[str], spell: Callable[[str], str]) -> UserError:
    """The error for a name that is no setting: why it is refused, or else the nearest known one.

    Args:
        name: with underscores, as in ``SETTINGS``.
        known: names that are accepted where this one was found.
        spell: writes a name as the user did, e.g. ``flag``.
    """
    for refused, reason in REFUSED.items():
        if name == refused or name.startswith(f"{refused}_"):
            return UserError(f"{spell(name)} is not supported: {reason}")
    near = nearest(name, known)
    hint = f"did you mean {spell(near)}?" if near else "--help lists all settings"
    return UserError(f"unknown setting {spell(name)}; {hint}")
