#!/usr/bin/env python
"""A corpus from the text that this Python installation carries: documentation, licences and sources.

python examples/quickstart/build_corpus.py --output-dir runs/quickstart/corpus --megabytes 16

writes train.jsonl and, with 4 % of the text, valid.jsonl: a JSON object {"path": ..., "text": ...} per line.
The documentation and the standard library are taken whole, then sources of the installed packages until the
size is reached. The same installation gives the same corpus.
"""

import argparse
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from megatron_mesh.errors import UserError
from megatron_mesh.runtime import strict_json
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error

LEAST = 8_000_000
"""Bytes of text that every installation should have."""
VALID_SHARE, LARGEST_VALID = 0.04, 64 << 10
"""Share of the text for validation, and the most bytes of a document there: many small ones vary less."""
_SMALLEST_FILE, _LARGEST_FILE = 200, 256 << 10
_LONGEST_LINE = 1000  # sources with a longer one are tables or generated
_DOCUMENTATION = (".md", ".rst", ".txt")
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


class Document(NamedTuple):
    """A line of the corpus."""

    path: str
    """Within the standard library or site-packages."""
    text: str


def main(argv: Sequence[str]) -> None:
    """Collect, then write."""
    arguments = _parser().parse_args(argv)
    output = Path(arguments.output_dir)
    if arguments.megabytes <= 0:
        raise UserError(f"--megabytes {arguments.megabytes:g} is out of range; it must be above 0")
    if (output / "train.jsonl").exists():
        raise UserError(f"{output} already holds a corpus; delete it, or choose another --output-dir")
    train, valid = split(collect(find_documents(), round(arguments.megabytes * 1e6)))
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, part in (("valid.jsonl", valid), ("train.jsonl", train)):
            written = write_jsonl(output / name, part)
            print(f"{output / name}: {len(part):,} documents, {written / 1e6:.2f} MB of text")
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}); choose another directory") from None


def collect(documents: Iterable[Document], size: int) -> list[Document]:
    """The first documents that have ``size`` bytes of text together, none of them twice.

    Raises:
        UserError: there is less than that, and less than ``LEAST``.
    """
    seen: set[str] = set()
    taken: list[Document] = []
    total = 0
    for document in documents:
        if total >= size:
            break
        key = _hash(document.text)
        if key not in seen:  # the same licence lies in fifty packages
            seen.add(key)
            taken.append(document)
            total += len(document.text.encode())
    if total < min(size, LEAST):
        raise UserError(
            f"this Python installation carries only {total / 1e6:.1f} MB of text, and {LEAST / 1e6:g} MB are "
            "needed; install more packages beside it (say, pip install sympy), or ask for less (--megabytes; "
            "--corpus-mb of run.py)"
        )
    return taken


def find_documents() -> Iterator[Document]:
    """Everything that may go into the corpus, the best first; each part in an order of its own."""
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
    """Training and validation documents, by a hash of their paths: a package more or less moves few."""
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
    """Write the documents; the file has its name once it is complete. Returns the bytes of text in it."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(strict_json.dumps(document._asdict(), ensure_ascii=False) + "\n")
    os.replace(partial, path)
    return sum(len(document.text.encode()) for document in documents)


def _language_reference() -> Iterator[Document]:
    """Chapters of Python's reference manual, which ``help()`` shows (some distributions leave them out)."""
    if find_spec("pydoc_data") is None or find_spec("pydoc_data.topics") is None:
        return
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"pydoc_data/topics/{name}", topics[name])


def _files(root: Path) -> Iterator[Path]:
    """Paths within ``root`` of all files that are not tests or tables."""
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(set(subdirectories) - _LEFT_OUT)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", required=True, help="directory of train.jsonl and valid.jsonl")
    parser.add_argument("--megabytes", type=float, default=16.0, help="text to collect (default: 16)")
    return parser


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
