"""The resolved configuration on disk: a YAML file that ``--config`` reads back."""

from dataclasses import asdict

import yaml

from megatron_mesh.config.schema import Config


def dump_config(config: Config) -> str:
    """Every setting as flat YAML, under one comment per group. As ``--config`` it gives ``config`` again."""
    return "\n".join(
        f"# {group}\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}"
        for group, settings in asdict(config).items()
    )
