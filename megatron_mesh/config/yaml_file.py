"""Reading YAML files, and expanding paths in them like a shell."""

import os
from pathlib import Path
from string import Template
from typing import Any

import yaml


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
