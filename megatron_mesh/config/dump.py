"""Writing the resolved configuration as a YAML file that ``--config`` reads back."""

from dataclasses import asdict

import yaml

from megatron_mesh.config.schema import Config
from megatron_mesh.config.sources import PATHS
from megatron_mesh.config.yaml_file import escape_path


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
