"""Writes and checks Megatron's indexed data: PREFIX.bin has the tokens, PREFIX.idx the document lengths.

The format is that of megatron/core/datasets/indexed_dataset.py.
"""

import hashlib
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, get_bin_path, get_idx_path

from megatron_mesh.compat.megatron_data import INDEX_HEADER, NumpyIndexWriter
from megatron_mesh.errors import UserError

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
_SAMPLES, _SAMPLE_BYTES = 63, 4096


class IndexedWriter:
    """Writes many documents at a time, to files equal byte for byte to those of IndexedDatasetBuilder.

    A context manager. It writes ``PREFIX.bin.partial`` and ``PREFIX.idx.partial``, which ``commit`` renames.
    Leaving the context without ``commit`` removes them, so an existing pair stays untouched.
    """

    def __init__(self, prefix: str, dtype: type[np.number[Any]]) -> None:
        self.prefix = prefix
        self.dtype = dtype
        self._lengths: list[np.ndarray] = []
        self._temporary = {path: f"{path}.partial" for path in (get_bin_path(prefix), get_idx_path(prefix))}
        try:
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
            self._bin = open(self._temporary[get_bin_path(prefix)], "wb")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot write {prefix}.bin: {error}; choose another --output-prefix") from error

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their concatenated tokens [sum(lengths)], and their lengths [documents]."""
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.append(np.array(lengths, dtype=np.int32))  # a copy: the caller may close its file

    def commit(self) -> None:
        """Write the index and give both files their final names."""
        self._bin.close()
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        with NumpyIndexWriter(self._temporary[get_idx_path(self.prefix)], self.dtype) as writer:
            writer.write(lengths, None, np.arange(len(lengths) + 1))
        for path, temporary in self._temporary.items():
            os.replace(temporary, path)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()
        for temporary in self._temporary.values():
            Path(temporary).unlink(missing_ok=True)


class IndexedFacts(NamedTuple):
    """The result of ``inspect_prefix`` for a pair of files."""

    sequences: int
    token_bytes: int
    fingerprint: str
    """Hash of all document lengths, on which the index depends, and of samples of the tokens."""
    sizes: tuple[int, int]
    """Bytes in the .idx and the .bin file."""


def inspect_prefix(prefix: str, flag: str = "--data-path") -> IndexedFacts:
    """Check PREFIX.bin and PREFIX.idx. Reads 4 bytes per document, and at most 256 KiB of the tokens.

    Megatron's reader would fail with an assertion or read past the end of a file.

    Args:
        flag: the command-line flag that gave the prefix, for error messages.

    Raises:
        UserError: a file is missing, the index is truncated or has another format, or the data are not as
            long as the index says.
    """
    try:
        return _inspect(prefix, flag)
    except OSError as error:
        raise UserError(f"{flag} {prefix}: {error.filename} cannot be read ({error.strerror})") from None


def _inspect(prefix: str, flag: str) -> IndexedFacts:
    idx, bin_ = Path(get_idx_path(prefix)), Path(get_bin_path(prefix))
    idx_bytes, bin_bytes = sizes = file_sizes(prefix, flag)
    with open(idx, "rb") as file:
        start = file.read(_HEADER.size)
    remedy = "write it again with tools/preprocess_data.py"
    if len(start) < _HEADER.size or not start.startswith(INDEX_HEADER):
        raise UserError(f"{idx} is truncated or not a Megatron index; {remedy}")
    _, version, code, sequences, documents = _HEADER.unpack_from(start)
    if version != 1 or code not in {kind.value for kind in DType}:
        raise UserError(f"{idx} has unknown version {version} or token type {code}; {remedy}")
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if idx_bytes not in (expected, expected + sequences):  # multimodal data have one more byte per sequence
        raise UserError(f"{idx} has {idx_bytes:,} bytes instead of {expected:,}: it is truncated; {remedy}")
    token_bytes = DType.size(code)
    tokens = _end_of_last_sequence(idx, sequences, token_bytes)
    if bin_bytes != tokens:
        raise UserError(f"{bin_} has {bin_bytes:,} bytes, but {idx} describes {tokens:,}; {remedy}")
    digest = hashlib.blake2b(start + struct.pack("<QQ", *sizes), digest_size=16)
    _add_lengths(digest, idx, sequences)
    _add_samples(digest, bin_, bin_bytes)
    return IndexedFacts(sequences, token_bytes, digest.hexdigest(), sizes)


def file_sizes(prefix: str, flag: str = "--data-path") -> tuple[int, int]:
    """Return the sizes of PREFIX.idx and PREFIX.bin in bytes. Raises UserError if one is missing."""
    paths = get_idx_path(prefix), get_bin_path(prefix)
    for path in paths:
        if not os.path.isfile(path):
            hint = ", without .bin or .idx" if prefix.endswith((".bin", ".idx")) else ""
            raise UserError(
                f"data file {path} does not exist; {flag} takes the prefix of a .bin and .idx pair{hint}"
                ", as tools/preprocess_data.py prints it"
            )
    return os.path.getsize(paths[0]), os.path.getsize(paths[1])


def _add_lengths(digest: "hashlib.blake2b", idx: Path, sequences: int) -> None:
    """Add the lengths of all documents, since the index depends on each of them and on their order."""
    left = 4 * sequences
    with open(idx, "rb") as file:
        file.seek(_HEADER.size)
        while left and (block := file.read(min(left, 1 << 22))):
            digest.update(block)
            left -= len(block)


def _add_samples(digest: "hashlib.blake2b", bin_: Path, size: int) -> None:
    """Add blocks of tokens from all over the file, since reading a large file entirely would take hours."""
    with open(bin_, "rb") as file:
        for offset in sorted(
            {size * i // _SAMPLES for i in range(_SAMPLES)} | {max(0, size - _SAMPLE_BYTES)}
        ):
            file.seek(offset)
            digest.update(file.read(_SAMPLE_BYTES))


def _end_of_last_sequence(idx: Path, sequences: int, token_bytes: int) -> int:
    """Return the size that the .bin file should have: start plus length of the last sequence in the index."""
    if sequences == 0:
        return 0
    with open(idx, "rb") as file:
        file.seek(_HEADER.size + 4 * (sequences - 1))
        length, *_ = struct.unpack("<i", file.read(4))
        file.seek(_HEADER.size + 4 * sequences + 8 * (sequences - 1))
        pointer, *_ = struct.unpack("<q", file.read(8))
    return pointer + length * token_bytes
