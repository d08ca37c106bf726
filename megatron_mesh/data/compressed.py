"""Reads .gz, .xz and .zst files, including those with several members, and detects truncated ones."""

import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol, cast

import zstandard

from megatron_mesh.errors import UserError

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
