"""Checksums of a checkpoint's files: damage is found before anything is read from them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

CHECKSUMS_FILE = "checksums.json"

# [size in bytes, SHA-256]
Digest = list


def digest(path: Path) -> Digest:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        sha = hashlib.file_digest(file, "sha256").hexdigest()
    return [path.stat().st_size, sha]


def write_checksums(directory: Path, known: dict[str, Digest]) -> None:
    """Write ``checksums.json``: ``known`` digests, and those of the files that are not among them."""
    others = {path.name: digest(path) for path in files(directory) if path.name not in known}
    listed = dict(sorted({**known, **others}.items()))
    text = json.dumps({"algorithm": "sha256", "files": listed, "sha256_of_files": _of_list(listed)}, indent=1)
    (directory / CHECKSUMS_FILE).write_text(text, encoding="utf-8")


def _of_list(listed: dict[str, Digest]) -> str:
    """Checksum of the list itself."""
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def files(directory: Path) -> list[Path]:
    """The files of a checkpoint, but for the list of checksums itself."""
    return sorted(path for path in directory.iterdir() if path.name != CHECKSUMS_FILE)


def read_checksums(directory: Path) -> dict[str, Digest]:
    """The digests in ``checksums.json`` by file name.

    Raises:
        ValueError: there is no such file, or it is not a list of digests.
    """
    try:
        content: Any = json.loads((directory / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        listed = {str(name): [int(size), str(sha)] for name, (size, sha) in content["files"].items()}
        if content["sha256_of_files"] != _of_list(listed):
            raise ValueError("it was changed after it was written")
        return listed
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{CHECKSUMS_FILE} cannot be trusted ({error})") from None


def damage(directory: Path, share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with the checkpoint, as sentences; nothing if it is whole.

    Args:
        share, shares: which part of the files this caller reads; sizes and names are always compared.
    """
    try:
        listed = read_checksums(directory)
    except ValueError as error:
        return [str(error)]
    found = [f"{path.name} is not part of it" for path in files(directory) if path.name not in listed]
    for index, (name, expected) in enumerate(sorted(listed.items())):
        try:
            reason = _difference(directory / name, expected, read=index % shares == share)
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
        if reason is not None:
            found.append(f"{name} {reason}")
    return found


def _difference(path: Path, expected: Digest, *, read: bool) -> str | None:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != expected[0]:
        return f"has {path.stat().st_size:,} bytes instead of {expected[0]:,}"
    if read and digest(path) != expected:
        return "was changed after it was written (its checksum is another)"
    return None


def damage_seen_by_all(directory: Path) -> list[str]:
    """``damage``, every file read by one rank; a collective operation with one result."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, damage(directory, dist.get_rank(), dist.get_world_size()))
    return list(dict.fromkeys(sentence for sentences in gathered for sentence in sentences))
