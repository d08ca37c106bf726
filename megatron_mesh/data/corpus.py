"""Reads raw text (JSON Lines or plain text, also compressed) in chunks that worker processes can parse.

Reads .gz, .xz and .zst files, including those with several members, and detects truncated ones.
"""

import glob
import gzip
import io
import json
import lzma
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol, cast

import zstandard

from megatron_mesh.errors import UserError

_JSONL = (".jsonl", ".json", ".ndjson")
_TEXT = (".txt", ".text")
_CATS = {".gz": "zcat", ".xz": "xzcat", ".zst": "zstdcat --long=31"}
_FORMATS = f"{', '.join(_JSONL)} (a JSON object per line) and {', '.join(_TEXT)} (a document per file)"


@dataclass(frozen=True)
class TextChunk:
    """Some complete lines of a JSONL file, or an entire text file."""

    path: Path
    first_line: int
    """Number of the first line, counted from 1."""
    data: bytes
    is_jsonl: bool
    disk_bytes: int
    """Bytes read from the disk since the previous chunk; of a compressed file, compressed bytes."""

    @property
    def place(self) -> str:
        """The file and its lines, for messages."""
        lines = self.data.rstrip(b"\n").count(b"\n")
        return f"{self.path}, line {self.first_line}" + (f" to {self.first_line + lines}" if lines else "")


@dataclass
class ParsedChunk:
    """The documents of a chunk: one list of texts per key, including empty texts."""

    texts: list[list[str]]
    broken: list[str] = field(default_factory=list)
    """For each skipped document, ``FILE, line N: cause``."""


def expand_inputs(patterns: list[str]) -> list[Path]:
    """Return the files that match paths and globs, in the given order. Matches of a glob are sorted.

    Raises:
        UserError: a pattern has no match, or matches a directory or a file of unknown format.
    """
    paths: list[Path] = []
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"--input {pattern}: no such file; check the path")
        paths.extend(Path(match) for match in matches)
    for path in paths:
        if not path.is_file():
            raise UserError(f"--input {path} is a directory; give its files, e.g. '{path}/*.jsonl'")
        if _format_suffix(path) not in _JSONL + _TEXT:
            raise UserError(
                f"--input {path}: unknown suffix; rename the file to {_FORMATS}, if compressed followed by "
                f"one of {', '.join(SUFFIXES)}"
            )
    return paths


def read_chunks(path: Path, chunk_bytes: int) -> Iterator[TextChunk]:
    """Cut a file into chunks of about ``chunk_bytes`` of decompressed text, or of one longer line.

    Raises:
        UserError: the file cannot be read or decompressed.
    """
    is_jsonl = _format_suffix(path) in _JSONL
    first_line, reported = 1, 0
    begun: list[bytes] = []  # the beginning of a line that is longer than a block
    with open_file(path) as (raw, file):
        while block := file.read(chunk_bytes if is_jsonl else -1):
            cut = block.rfind(b"\n") + 1 if is_jsonl else len(block)
            if cut == 0:
                begun.append(block)
                continue
            data = b"".join([*begun, block[:cut]])
            begun = [block[cut:]]
            yield TextChunk(path, first_line, data, is_jsonl, raw.tell() - reported)
            first_line += data.count(b"\n")
            reported = raw.tell()
        if data := b"".join(begun):
            yield TextChunk(path, first_line, data, is_jsonl, raw.tell() - reported)


def parse_chunk(chunk: TextChunk, keys: list[str], *, skip_broken: bool) -> ParsedChunk:
    """Parse the documents of a chunk. A text file is one document, with the same text under every key.

    Raises:
        UserError: a document is broken. With ``skip_broken`` it is listed in the result instead.
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
                raise UserError(f"{problem}; correct it, or skip such documents with --skip-broken") from None
            parsed.broken.append(problem)
    return parsed


def _decoded(chunk: TextChunk) -> Iterator[tuple[int, str | bytes]]:
    """Yield numbered lines, or the entire text of a text file. They are bytes if the UTF-8 is broken."""
    start = 3 if chunk.first_line == 1 and chunk.data.startswith(b"\xef\xbb\xbf") else 0
    data = chunk.data[start:] if start else chunk.data
    try:
        text: str | bytes = data.decode()
    except UnicodeDecodeError:
        text = data
    if not chunk.is_jsonl:
        yield 1, text
    elif isinstance(text, str):
        yield from enumerate(text.split("\n"), chunk.first_line)
    else:
        yield from enumerate(text.split(b"\n"), chunk.first_line)


def _fields(line: str | bytes, keys: list[str], is_jsonl: bool) -> list[str]:
    """Return the texts of one document under ``keys``. Raises ValueError with the cause if it is broken."""
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
            raise ValueError(f"no text under the key {key!r} (--json-keys); its keys are: {keys_here:.200}")
        texts.append(document[key])
    if "\\ud" in line or "\\uD" in line:  # json accepts half of a surrogate pair, UTF-8 doesn't
        for text in texts:
            text.encode()
    return texts


def _mostly_objects(chunk: TextChunk) -> bool:
    """Return whether most lines are valid JSON objects, so that only single documents are broken."""
    lines, objects = 0, 0
    for _, line in _decoded(chunk):
        lines += bool(line.strip())
        with suppress(ValueError, RecursionError):
            objects += isinstance(json.loads(line), dict)
    return 2 * objects > lines


def _how_to_convert(chunk: TextChunk) -> str:
    """If the file is a JSON array or has objects over several lines, say how to convert it; otherwise "".

    Only the first chunk can show that.
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
        f"The file holds {kind}, but needs one object per line; convert it with: {source} -c {program!r} "
        f"{'' if ending in _CATS else shlex.quote(str(path)) + ' '}> {shlex.quote(name + '.lines.jsonl')}"
    )


def _spans_lines(text: str) -> bool:
    """Return whether a text begins with a JSON object over several lines."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):  # the object may be larger than the chunk
        return text.partition("\n")[0].rstrip() == "{"
    return "\n" in text[:end]


def _line_of(error: ValueError, line: str | bytes, number: int) -> int:
    """Return the line of an error. In a text file, count the lines up to the byte that is not UTF-8."""
    if isinstance(error, UnicodeDecodeError) and isinstance(line, bytes):
        return number + line.count(b"\n", 0, error.start)
    return number


def _format_suffix(path: Path) -> str:
    """Return the suffix of the format in lower case, e.g. ``.jsonl`` for ``A.JSONL.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


_ZSTD_WINDOW = 1 << 31
"""zstd's largest window (``zstd --ultra --long=31``); decompressing takes as many bytes of memory."""
_INPUT_BYTES = 1 << 14
"""Compressed bytes to decompress at a time. Small, since repetitive text can grow several thousand times."""


@contextmanager
def open_file(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file; yield the raw file and its content, decompressed according to the suffix.

    Raises:
        UserError: the file cannot be read, is truncated, damaged or has another format. This may happen while
            the caller reads the content.
    """
    suffix = path.suffix.lower()
    open_content = _OPENERS.get(suffix, lambda raw: raw)
    try:
        with open(path, "rb") as raw:
            yield raw, open_content(raw)
    except EOFError as error:
        raise UserError(
            f"{path} is truncated: it ends in the middle of its {suffix} data; copy or download it again"
        ) from error
    except zstandard.ZstdError as error:
        if "too much memory" in str(error):
            raise UserError(
                f"{path} needs a window above 2 GiB, which zstd cannot read here; compress it again with "
                "zstd --long=31 or less"
            ) from error
        raise UserError(
            f"{path} cannot be read: {error}; check that it is a complete {suffix} file"
        ) from error
    except (OSError, lzma.LZMAError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read: {error}; check that it is complete and that its suffix is right"
        ) from error


class _Decompressor(Protocol):
    """One member of a compressed file."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class _Members(io.RawIOBase):
    """A file object with the concatenated contents of all members of a .zst or .xz file.

    The readers of the libraries hide damage: zstandard's reports no error for a truncated file, and lzma's
        stops
    silently before a damaged second member. This one raises EOFError or the decompressor's error.
    """

    def __init__(
        self, raw: IO[bytes], open_member: Callable[[], _Decompressor], padding: bytes = b""
    ) -> None:
        self._raw, self._open_member, self._padding = raw, open_member, padding
        self._member: _Decompressor | None = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._output:
            self._input = self._input or self._raw.read(_INPUT_BYTES)
            if not self._input:
                if self._member is not None:
                    raise EOFError("the file ends within a member")
                return 0
            if self._member is None:
                self._input = self._input.lstrip(self._padding)
                self._member = self._open_member() if self._input else None
                continue
            self._output = memoryview(self._member.decompress(self._input))
            self._input = self._member.unused_data
            if self._member.eof:
                self._member = None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def _open_zstd_frame() -> _Decompressor:
    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()


_OPENERS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".gz": lambda raw: cast(IO[bytes], gzip.GzipFile(fileobj=raw)),
    ".xz": lambda raw: io.BufferedReader(_Members(raw, lzma.LZMADecompressor, padding=b"\0"), 1 << 17),
    ".zst": lambda raw: io.BufferedReader(_Members(raw, _open_zstd_frame), 1 << 17),
}
SUFFIXES = tuple(_OPENERS)
