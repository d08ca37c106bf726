"""The code that an export carries: copies of our own source files, with their imports made relative.

transformers loads a model's code from one flat directory and, before 5.0, copies only those files that the
model's own two files name in ``from .name import``. So every shipped file must be named in one of those two.
"""

import ast
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import megatron_mesh
from megatron_mesh.hf.tokenizer import CODE as TOKENIZER_CODE

AUTO_MAP = {
    "AutoConfig": "configuration_mesh.MeshConfig",
    "AutoModel": "modeling_mesh.MeshModel",
    "AutoModelForCausalLM": "modeling_mesh.MeshForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mesh.MeshForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_mesh.MeshForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_mesh.MeshForQuestionAnswering",
}
"""``auto_map`` of config.json: the file and class that each of transformers' auto classes loads."""

_ROOT = Path(str(megatron_mesh.__file__)).parent
_PACKAGES = ("hf", "recurrence")  # the folders whose files may be shipped
_FLAT = re.compile(rf"^([ \t]*from )megatron_mesh\.(?:{'|'.join(_PACKAGES)})\.", re.MULTILINE)
_HEADER = re.compile(r"# Part of megatron_mesh (\S+) \(Apache-2\.0\)(?:, sha256 ([0-9a-f]{64}))?\.\n")


def sources() -> dict[str, str]:
    """File name and text of every shipped file, the files that others import first.

    They are the files that AUTO_MAP names and whatever these import from this package.

    Raises:
        ValueError: a shipped file imports something from megatron_mesh that cannot be shipped.
    """
    found: dict[str, Path] = {}
    seen: set[Path] = set()
    for name in sorted({entry.split(".")[0] for entry in AUTO_MAP.values()}):
        _collect(_ROOT / "hf" / f"{name}.py", found, seen)
    return {name: _shipped(path.read_text(encoding="utf-8")) for name, path in found.items()}


def tokenizer_source() -> dict[str, str]:
    """File name and text of the tokenizer class, for the exports that need it."""
    path = Path(__file__).with_name(f"{TOKENIZER_CODE}.py")
    return {path.name: _shipped(path.read_text(encoding="utf-8"))}


class Header(NamedTuple):
    """What the first line of a shipped file tells."""

    version: str
    """Of the megatron_mesh that wrote the file."""
    intact: bool | None
    """Whether the rest is as it was written; None if the line has no checksum, as in early exports."""


def read_header(text: str) -> Header | None:
    """The header of a shipped file's text, None if the text has no header of ours."""
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
    """The files of this package that a file imports."""
    files = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"megatron_mesh.{path.parent.name}.{node.module}" if node.level else str(node.module)]
        else:
            continue
        for module in (name for name in modules if name.split(".")[0] == "megatron_mesh"):
            _, *names = module.split(".")
            file = _ROOT.joinpath(*names).with_suffix(".py")
            if isinstance(node, ast.Import) or names[0] not in _PACKAGES or not file.is_file():
                raise ValueError(f"{path} imports {module}: write 'from megatron_mesh.hf.NAME import ...'")
            files.append(file)
    return files


def _shipped(text: str) -> str:
    text = _FLAT.sub(r"\1.", text)
    return (
        f"# Part of megatron_mesh {megatron_mesh.__version__} (Apache-2.0), sha256 {_checksum(text)}.\n{text}"
    )


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
