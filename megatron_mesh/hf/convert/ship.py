"""Collects the code that an export carries: copies of our own source files with relative imports.

transformers loads a model's code from one flat directory. Before 5.0 it copies only the files that the
model's two main files name in ``from .name import``, so every shipped file must be named in one of those two.
"""

import ast
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import megatron_mesh
from megatron_mesh.hf.modeling import versions

AUTO_MAP = {
    "AutoConfig": "configuration_mesh.MeshConfig",
    "AutoModel": "modeling_mesh.MeshModel",
    "AutoModelForCausalLM": "modeling_mesh.MeshForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mesh.MeshForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_mesh.MeshForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_mesh.MeshForQuestionAnswering",
}
"""``auto_map`` of config.json: the file and class that each of transformers' auto classes loads."""
TOKENIZER_CODE, TOKENIZER_CLASS = "tokenization_mesh", "MeshTokenizer"
"""Module and class of the tokenizer that an export carries if no stock tokenizer gives the same ids."""

_ROOT = Path(str(megatron_mesh.__file__)).parent
_MODELING = Path(versions.__file__).parent  # the folder of the files that AUTO_MAP names
_FOLDERS = (_MODELING, _ROOT / "recurrence")  # only files that lie in these may be shipped
_PACKAGE_IMPORT = re.compile(r"^([ \t]*from )megatron_mesh\.(?:\w+\.)*(?=\w+ import )", re.MULTILINE)
_HEADER = re.compile(r"# Part of megatron_mesh (\S+) \(Apache-2\.0\)(?:, sha256 ([0-9a-f]{64}))?\.\n")


def sources() -> dict[str, str]:
    """Return name and text of every shipped file, each after the files that it imports.

    These are the files that AUTO_MAP names, and the files of this package that they import.

    Raises:
        ValueError: a shipped file imports something from megatron_mesh that cannot be shipped.
    """
    found: dict[str, Path] = {}
    seen: set[Path] = set()
    for name in sorted({entry.split(".")[0] for entry in AUTO_MAP.values()}):
        _collect(_MODELING / f"{name}.py", found, seen)
    return {name: _shipped(path.read_text(encoding="utf-8")) for name, path in found.items()}


def tokenizer_source() -> dict[str, str]:
    """Return name and text of the tokenizer's file, for exports that need it."""
    path = _MODELING / f"{TOKENIZER_CODE}.py"
    return {path.name: _shipped(path.read_text(encoding="utf-8"))}


class Header(NamedTuple):
    """The first line of a shipped file."""

    version: str
    """The version of megatron_mesh that wrote the file."""
    intact: bool | None
    """Whether the rest of the file is unchanged; None if the line has no checksum, as in early exports."""


def read_header(text: str) -> Header | None:
    """Return the header of a shipped file's text, or None if we didn't write the file."""
    match = _HEADER.match(text)
    if match is None:
        return None
    version, checksum = match.groups()
    return Header(version, None if checksum is None else checksum == _checksum(text[match.end() :]))


def _collect(path: Path, found: dict[str, Path], seen: set[Path]) -> None:
    """Add ``path`` to ``found``, after the files that it imports."""
    if path in seen:
        return
    seen.add(path)
    for imported in _imports(path):
        _collect(imported, found, seen)
    if path.name in found:
        raise ValueError(f"{path} and {found[path.name]} cannot be shipped together: rename one")
    found[path.name] = path


def _imports(path: Path) -> list[Path]:
    """Return the files of this package that a file imports."""
    files = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = ".".join(("megatron_mesh", *path.parent.relative_to(_ROOT).parts))
            modules = [f"{folder}.{node.module}" if node.level else str(node.module)]
        else:
            continue
        for module in (name for name in modules if name.split(".")[0] == "megatron_mesh"):
            file = _ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
            if isinstance(node, ast.Import) or file.parent not in _FOLDERS or not file.is_file():
                folders = " or ".join(folder.relative_to(_ROOT.parent).as_posix() for folder in _FOLDERS)
                raise ValueError(
                    f"{path} imports {module}, which cannot be shipped: write "
                    f"'from megatron_mesh.FOLDER.NAME import ...', where NAME is a file in {folders}"
                )
            files.append(file)
    return files


def _shipped(text: str) -> str:
    """Return a source text with relative imports and a header."""
    text = _PACKAGE_IMPORT.sub(r"\1.", text)
    return (
        f"# Part of megatron_mesh {megatron_mesh.__version__} (Apache-2.0), sha256 {_checksum(text)}.\n{text}"
    )


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
