"""All settings by name. Names are unique across groups, so flags and YAML keys are flat."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, get_type_hints

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
