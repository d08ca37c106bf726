"""Reading YAML files, and paths in them as a shell would read them."""

import os
from pathlib import Path
from string import Template
from typing import Any

import yaml


def load_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8 or not YAML, or a mapping has a key twice (PyYAML takes the last one).
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
    """Refuses a key that is given twice, naming both lines."""

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
    """``text`` with ``~``, ``$VAR`` and ``${VAR}`` replaced as in a shell; ``$$`` stands for ``$``.

    Raises:
        ValueError: no such variable, or a ``$`` that begins none.
    """
    try:
        return expand_user(Template(text).substitute(os.environ))
    except KeyError as error:
        raise ValueError(f"the environment variable {error.args[0]} is not set") from None
    except ValueError:
        raise ValueError("a $ must begin a variable, e.g. $HOME; write $$ for the character") from None


def expand_user(text: str) -> str:
    """``text`` with a leading ``~`` replaced, also in NAME=PATH."""
    name, equals, path = text.partition("=")
    return name + equals + os.path.expanduser(path) if path.startswith("~") else os.path.expanduser(text)


def escape_path(text: str) -> str:
    """``text`` with every ``$`` protected from ``expand_path``."""
    return text.replace("$", "$$")
