"""The resolved configuration on disk: a YAML file that ``--config`` reads back."""

from dataclasses import asdict

import yaml

from megatron_mesh.config.schema import Config
from megatron_mesh.config.sources import PATHS
from megatron_mesh.config.yaml_file import escape_path


def dump_config(config: Config) -> str:
    """Every setting as flat YAML, under one comment per group. As ``--config`` it gives ``config`` again."""
    groups = asdict(config)
    for settings in groups.values():
        settings.update({name: _escaped(settings[name]) for name in PATHS & settings.keys()})
    return "\n".join(
        f"# {group}\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}"
        for group, settings in groups.items()
    )


def _escaped(value: str | list[str] | None) -> str | list[str] | None:
    """A path, or several, such that reading the file doesn't expand it."""
    if isinstance(value, list):
        return [escape_path(word) for word in value]
    return None if value is None else escape_path(value)
