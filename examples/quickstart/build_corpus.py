#!/usr/bin/env python
"""Build a corpus from the text in this Python installation: documentation, licences and sources.

    python examples/quickstart/build_corpus.py --output-dir runs/quickstart/corpus --megabytes 16

Writes train.jsonl, and valid.jsonl with 4 % of the text. Each line is a JSON object {"path": ..., "text":
...}. Documentation comes first, then the standard library, then sources of the installed packages, until the
text has the given size. The same installation always gives the same corpus.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from megatron_mesh import command
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import strict_json

LEAST = 8_000_000
"""Bytes of text that every Python installation should have."""
VALID_SHARE, LARGEST_VALID = 0.04, 64 << 10
"""Share of the text for validation, and its largest document in bytes: many small ones vary less."""
_SMALLEST_FILE, _LARGEST_FILE = 200, 256 << 10
_LONGEST_LINE = 1000  # sources with longer lines are tables or generated
_DOCUMENTATION = (".md", ".rst", ".txt")
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


class Document(NamedTuple):
    """One line of the corpus."""

    path: str
    """Path within the standard library or site-packages."""
    text: str


@dataclass
class Options:
    """Options of the corpus."""

    output_dir: Path
    """Directory for train.jsonl and valid.jsonl."""
    megabytes: float = 16.0
    """Amount of text to collect, in MB."""


def main(options: Options) -> None:
    """Collect the documents and write them."""
    output = options.output_dir
    if options.megabytes <= 0:
        raise UserError(f"--megabytes {options.megabytes:g} is out of range; it must be above 0")
    if (output / "train.jsonl").exists():
        raise UserError(f"{output} already holds a corpus; delete it, or choose another --output-dir")
    train, valid = split(collect(find_documents(), round(options.megabytes * 1e6)))
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, part in (("valid.jsonl", valid), ("train.jsonl", train)):
            written = write_jsonl(output / name, part)
            print(f"{output / name}: {len(part):,} documents, {written / 1e6:.2f} MB of text")
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}); choose another directory") from None


def collect(documents: Iterable[Document], size: int) -> list[Document]:
    """Take documents until they have ``size`` bytes of text, without duplicates.

    Raises:
        UserError: there is less text than the smaller of ``size`` and ``LEAST``.
    """
    seen: set[str] = set()
    taken: list[Document] = []
    total = 0
    for document in documents:
        if total >= size:
            break
        key = _hash(document.text)
        if key not in seen:  # fifty packages contain the same licence
            seen.add(key)
            taken.append(document)
            total += len(document.text.encode())
    if total < min(size, LEAST):
        raise UserError(
            f"this Python installation has only {total / 1e6:.1f} MB of text and needs {LEAST / 1e6:g} MB; "
            "install more packages (for example pip install sympy), or ask for less text (--megabytes, or "
            "--corpus-mb of run.py)"
        )
    return taken


def find_documents() -> Iterator[Document]:
    """Yield all documents that may go into the corpus, the best kinds first, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    packages = sorted({Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")})
    files = {root: [*_files(root)] for root in (library, *packages)}
    yield from _language_reference()
    for root, paths in files.items():
        yield from _read(root, filter(_is_documentation, paths))
    yield from _read(library, (path for path in files[library] if path.suffix == ".py"))
    for root in packages:
        sources = [path for path in files[root] if path.suffix == ".py"]
        yield from _read(root, sorted(sources, key=lambda path: _hash(str(path))))


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Split into training and validation documents by a hash of their paths.

    So installing or removing a package moves few documents between the two.
    """
    train: list[Document] = []
    valid: list[Document] = []
    wanted = VALID_SHARE * sum(len(document.text.encode()) for document in documents)
    for document in sorted(documents, key=lambda document: _hash(document.path)):
        size = len(document.text.encode())
        if wanted > 0 and size <= LARGEST_VALID:
            valid.append(document)
            wanted -= size
        else:
            train.append(document)
    return train, valid


def write_jsonl(path: Path, documents: list[Document]) -> int:
    """Write the documents, and rename the file once it is complete. Return its bytes of text."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(strict_json.dumps(document._asdict(), ensure_ascii=False) + "\n")
    os.replace(partial, path)
    return sum(len(document.text.encode()) for document in documents)


def _language_reference() -> Iterator[Document]:
    """Chapters of Python's reference manual, as ``help()`` shows them (some distributions omit them)."""
    if find_spec("pydoc_data") is None or find_spec("pydoc_data.topics") is None:
        return
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"pydoc_data/topics/{name}", topics[name])


def _files(root: Path) -> Iterator[Path]:
    """Yield the paths, relative to ``root``, of all files except tests and generated tables."""
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(set(subdirectories) - _SKIPPED)
        for name in sorted(names):
            if not name.startswith("test_") and not name.endswith("_pb2.py"):
                yield Path(directory, name).relative_to(root)


def _is_documentation(path: Path) -> bool:
    if path.parts[0].endswith((".dist-info", ".egg-info")):
        return path.name == "METADATA" or path.name.upper().startswith(("LICENSE", "COPYING", "NOTICE"))
    return path.suffix in _DOCUMENTATION


def _read(root: Path, paths: Iterable[Path]) -> Iterator[Document]:
    for path in paths:
        file = root / path
        if not _SMALLEST_FILE <= file.stat().st_size <= _LARGEST_FILE:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, PermissionError):
            continue
        if path.suffix != ".py" or max(map(len, text.splitlines())) <= _LONGEST_LINE:
            yield Document(path.as_posix(), text)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    command.run(main)
