"""Checksums of a checkpoint: computed while writing, compared while reading.

``checksums.json`` lists the consecutive pieces of each file with their lengths in bytes and SHA-256. A tensor
file has one piece per box, so a rank that reads only some boxes checks only those.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, BinaryIO

from megatron_mesh.runtime import strict_json

CHECKSUMS_FILE = "checksums.json"

Digests = dict[str, list[tuple[int, str]]]
"""For each file, the lengths and SHA-256 of its pieces, in order."""

_BLOCK = 2**24

_CHECKPOINT_FILES = re.compile(
    r"\.metadata|metadata\.json|common\.pt|config\.yaml|state\.json|__\d+_\d+\.distcp"
)


def sha256(data: bytes | memoryview) -> str:
    """Return the SHA-256 of bytes as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest(path: Path) -> list[Any]:
    """Return the size in bytes and the SHA-256 of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def files(directory: Path) -> list[Path]:
    """Return the files of a checkpoint, except for its checksums. Ignores others (``.nfs...``, a README)."""
    return sorted(path for path in directory.iterdir() if _CHECKPOINT_FILES.fullmatch(path.name))


def write_checksums(directory: Path, digests: Digests) -> None:
    """Write the digests of all other files to ``checksums.json``."""
    listed = dict(sorted(digests.items()))
    text = strict_json.dumps(
        {"algorithm": "sha256", "files": listed, "sha256_of_files": _checksum_of_list(listed)}
    )
    (directory / CHECKSUMS_FILE).write_text(text, encoding="utf-8")


def _checksum_of_list(listed: Any) -> str:
    """Return the checksum of the list itself."""
    return sha256(strict_json.dumps(listed, sort_keys=True).encode())


def read_checksums(directory: Path) -> Digests:
    """Read the digests in ``checksums.json``. In format 2 every file is one piece.

    Raises:
        ValueError: the file is missing or damaged.
        PermissionError: the file may not be read. The checkpoint may still be intact.
    """
    try:
        content: Any = json.loads((directory / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        listed = content["files"]
        if content["sha256_of_files"] != _checksum_of_list(listed):
            raise ValueError("it was changed after it was written")
        return {str(name): _pieces(entry) for name, entry in listed.items()}
    except FileNotFoundError:
        raise ValueError(f"{CHECKSUMS_FILE} is missing") from None
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{CHECKSUMS_FILE} cannot be trusted ({error})") from None


def _pieces(entry: Any) -> list[tuple[int, str]]:
    pieces = [entry] if entry and isinstance(entry[0], int) else entry
    return [(int(length), str(digest)) for length, digest in pieces]


def find_differences(
    directory: Path, digests: Digests, *, read: bool, share: int = 0, shares: int = 1
) -> list[str]:
    """Compare files with their digests; return a sentence for each file that differs.

    Args:
        directory: the checkpoint.
        digests: the expected digests.
        read: compare contents, not only sizes.
        share, shares: read only every ``shares``-th file, from number ``share`` on. Sizes are compared for
            all.
    """
    found = []
    for number, (name, pieces) in enumerate(sorted(digests.items())):
        try:
            reason = _difference(directory / name, pieces, read=read and number % shares == share)
        except PermissionError:
            raise
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
        if reason is not None:
            found.append(f"{name} {reason}")
    return found


def find_damage(directory: Path) -> list[str]:
    """Read an entire checkpoint; return a sentence for each file that is damaged."""
    try:
        return find_differences(directory, read_checksums(directory), read=True)
    except ValueError as error:
        return [str(error)]


def find_cheap_damage(directory: Path) -> list[str]:
    """Compare the sizes of all files and the contents of the small ones, without reading tensors."""
    try:
        digests = read_checksums(directory)
    except ValueError as error:
        return [str(error)]
    small = {name: pieces for name, pieces in digests.items() if not name.endswith(".distcp")}
    return find_differences(directory, digests, read=False) or find_differences(directory, small, read=True)


def _difference(path: Path, pieces: list[tuple[int, str]], *, read: bool) -> str | None:
    if not path.is_file():
        return "is missing"
    size, expected = path.stat().st_size, sum(length for length, _ in pieces)
    if size != expected:
        return f"has {size:,} bytes instead of {expected:,}"
    if not read:
        return None
    with path.open("rb") as file:
        intact = all(_sha256_of_next(file, length) == digest for length, digest in pieces)
    return None if intact else "was changed after it was written (its checksum doesn't match)"


def _sha256_of_next(file: BinaryIO, length: int) -> str:
    """Hash the next ``length`` bytes in blocks, because a large file of the old format is a single piece."""
    digest = hashlib.sha256()
    while length and (block := file.read(min(length, _BLOCK))):
        digest.update(block)
        length -= len(block)
    return digest.hexdigest()
