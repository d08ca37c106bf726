"""Reading raw text: JSON Lines and plain text, also compressed, in chunks that other processes can parse."""

import glob
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mesh.data.compressed import SUFFIXES as _COMPRESSED
from megatron_mesh.data.compressed import open_file
from megatron_mesh.errors import UserError

_JSONL = (".jsonl", ".json", ".ndjson")
_TEXT = (".txt", ".text")
_CATS = {".gz": "zcat", ".xz": "xzcat", ".zst": "zstdcat --long=31"}
_FORMATS = f"{', '.join(_JSONL)} (a JSON object per line) and {', '.join(_TEXT)} (a document per file)"


@dataclass(frozen=True)
class Chunk:
    """A run of whole lines of a JSONL file, or one whole text file."""

    path: Path
    first_line: int
    """Number of the first line, from 1."""
    data: bytes
    is_jsonl: bool
    disk_bytes: int
    """Bytes read from the disk (compressed, perhaps) since the chunk before."""

    @property
    def place(self) -> str:
        """File and lines, for people."""
        lines = self.data.rstrip(b"\n").count(b"\n")
        return f"{self.path}, line {self.first_line}" + (f" to {self.first_line + lines}" if lines else "")


@dataclass
class ParsedChunk:
    """The documents of a chunk: one list of texts for each wanted key, empty texts included."""

    texts: list[list[str]]
    broken: list[str] = field(default_factory=list)
    """What was wrong with the documents left out: ``FILE, line N: cause``."""


def expand_inputs(patterns: list[str]) -> list[Path]:
    """Files named by paths and globs, in the order given; the matches of a glob are sorted.

    Raises UserError for a pattern without a match, a directory, and a name that does not tell the format.
    """
    paths: list[Path] = []
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"--input {pattern}: no such file.")
        paths.extend(Path(match) for match in matches)
    for path in paths:
        if not path.is_file():
            raise UserError(f"--input {path} is a directory; name its files, e.g. '{path}/*.jsonl'.")
        if _format_suffix(path) not in _JSONL + _TEXT:
            raise UserError(
                f"--input {path}: the name does not tell the format. Known: {_FORMATS}, each also with "
                f"{', '.join(_COMPRESSED)}."
            )
    return paths


def read_chunks(path: Path, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut a file into chunks of about ``chunk_bytes`` of decompressed text, or of one line if that is longer.

    Raises UserError when the file cannot be read or decompressed.
    """
    is_jsonl = _format_suffix(path) in _JSONL
    first_line, reported = 1, 0
    begun: list[bytes] = []  # the start of a line that is longer than a block
    with open_file(path) as (raw, file):
        while block := file.read(chunk_bytes if is_jsonl else -1):
            cut = block.rfind(b"\n") + 1 if is_jsonl else len(block)
            if cut == 0:
                begun.append(block)
                continue
            data = b"".join([*begun, block[:cut]])
            begun = [block[cut:]]
            yield Chunk(path, first_line, data, is_jsonl, raw.tell() - reported)
            first_line += data.count(b"\n")
            reported = raw.tell()
        if data := b"".join(begun):
            yield Chunk(path, first_line, data, is_jsonl, raw.tell() - reported)


def parse_chunk(chunk: Chunk, keys: list[str], *, skip_broken: bool) -> ParsedChunk:
    """The texts of a chunk's documents; a text file is one document, under every key.

    Raises UserError at the first broken document, naming file and line; with ``skip_broken`` lists it.
    """
    parsed = ParsedChunk([[] for _ in keys])
    for number, line in _decoded(chunk):
        if chunk.is_jsonl and (not line or line.isspace()):
            continue
        try:
            for texts, text in zip(parsed.texts, _fields(line, keys, chunk.is_jsonl), strict=True):
                texts.append(text)
        except ValueError as error:
            problem = f"{chunk.path}, line {_line_of(error, line, number)}: {error}"
            if (
                remedy := ""
                if parsed.broken or (skip_broken and _mostly_objects(chunk))
                else _how_to_convert(chunk)
            ):
                raise UserError(f"{problem}. {remedy}") from None
            if not skip_broken:
                raise UserError(
                    f"{problem}. Correct it, or leave such documents out with --skip-broken."
                ) from None
            parsed.broken.append(problem)
    return parsed


def _decoded(chunk: Chunk) -> Iterator[tuple[int, str | bytes]]:
    """Numbered lines (or the whole text); bytes where the UTF-8 is broken."""
    start = 3 if chunk.first_line == 1 and chunk.data.startswith(b"\xef\xbb\xbf") else 0
    data = chunk.data[start:] if start else chunk.data
    try:
        whole: str | bytes = data.decode()
    except UnicodeDecodeError:
        whole = data
    if not chunk.is_jsonl:
        yield 1, whole
    elif isinstance(whole, str):
        yield from enumerate(whole.split("\n"), chunk.first_line)
    else:
        yield from enumerate(whole.split(b"\n"), chunk.first_line)


def _fields(line: str | bytes, keys: list[str], is_jsonl: bool) -> list[str]:
    """The wanted texts of one document. Raises ValueError that says what is wrong."""
    if isinstance(line, bytes):
        line = line.decode()
    if not is_jsonl:
        return [line] * len(keys)
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    texts = []
    for key in keys:
        if not isinstance(document.get(key), str):
            keys_here = ", ".join(map(repr, document)) or "none"
            raise ValueError(f"no text under the key {key!r} (--json-keys); the keys here: {keys_here:.200}")
        texts.append(document[key])
    if "\\ud" in line or "\\uD" in line:  # half of a surrogate pair passes json but is no text
        for text in texts:
            text.encode()
    return texts


def _mostly_objects(chunk: Chunk) -> bool:
    """Whether most lines are JSON objects of their own, so that only the others are broken."""
    lines, objects = 0, 0
    for _, line in _decoded(chunk):
        lines += bool(line.strip())
        with suppress(ValueError, RecursionError):
            objects += isinstance(json.loads(line), dict)
    return 2 * objects > lines


def _how_to_convert(chunk: Chunk) -> str:
    """How to make JSON Lines of a JSON array or of objects over several lines; "" if the file is neither.

    Only the start of the file can tell.
    """
    if chunk.first_line != 1 or not chunk.is_jsonl:
        return ""
    start = chunk.data.decode(errors="replace").lstrip("\ufeff \t\r\n")
    if re.match(r"\[\s*(\{|$)", start):
        kind, program = "a JSON array", ".[]"
    elif _spans_lines(start):
        kind, program = "JSON objects over several lines", "."
    else:
        return ""
    path, ending = chunk.path, chunk.path.suffix.lower()
    source = f"{_CATS[ending]} {shlex.quote(str(path))} | jq" if ending in _CATS else "jq"
    name = path.name[: path.name.lower().rindex(_format_suffix(path))]
    return (
        f"The file holds {kind}; a line must hold one object. To convert it: {source} -c {program!r} "
        f"{'' if ending in _CATS else shlex.quote(str(path)) + ' '}> {shlex.quote(name + '.lines.jsonl')}"
    )


def _spans_lines(text: str) -> bool:
    """Whether a text begins with a JSON object over several lines."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):  # perhaps it is larger than a chunk
        return text.partition("\n")[0].rstrip() == "{"
    return "\n" in text[:end]


def _line_of(error: ValueError, line: str | bytes, number: int) -> int:
    """In a text file, the line of a byte that is not UTF-8; in JSONL the line is known."""
    if isinstance(error, UnicodeDecodeError) and isinstance(line, bytes):
        return number + line.count(b"\n", 0, error.start)
    return number


def _format_suffix(path: Path) -> str:
    """The ending that tells the format, in small letters: of ``A.JSONL.gz`` it is ``.jsonl``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""
