"""The commands of tools/checkpoint.py: list, show, verify and reshard."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from megatron_mesh.checkpoint import directory as names
from megatron_mesh.checkpoint import integrity, offline
from megatron_mesh.checkpoint.content import NOT_WEIGHTS
from megatron_mesh.checkpoint.index import Box, Index, cut, read_index
from megatron_mesh.checkpoint.load import updates_of
from megatron_mesh.checkpoint.reader import read_piece
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import strict_json
from megatron_mesh.runtime.run_files import CONFIG_FILE


def checkpoint_table(directory: Path) -> str:
    """List the checkpoints in a run's directory (or one checkpoint): step, size, losses.

    A checkpoint whose description cannot be read gets a line with the error.
    """
    rows = [("step", "GiB", "ranks", "train loss", "valid loss", "path")]
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; give a run's --save directory")
    given = {0: directory} if (directory / names.STATE_FILE).is_file() else {}
    for step, path in (given or names.saved_steps(directory)).items():
        try:
            saved = names.read_checkpoint(path)
        except UserError as error:
            rows.append((f"{step:,}", "", "", "", "", str(error)))
            continue
        step = saved.train_state["step"]
        train, valid = (format_loss(saved.train_state, name) for name in ("train_loss", "valid_loss"))
        size = sum(file.stat().st_size for file in integrity.files(path)) / 2**30
        rows.append((f"{step:,}", f"{size:,.2f}", str(saved.world_size), train, valid, str(path)))
    if len(rows) == 1:
        raise UserError(
            f"{directory} holds no complete checkpoint (no iter_... directory); check the directory"
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row[:-1], widths, strict=False)) for row in rows]
    return "\n".join(f"{line}  {row[-1]}" for line, row in zip(lines, rows, strict=True))


def format_loss(state: dict[str, Any], name: str) -> str:
    """Format a loss. If it is from an earlier step, since not every step has one, add that step."""
    if state[name] is None:
        return ""
    of = state.get(f"{name}_step", state["step"])
    return f"{state[name]:.4f}" + (f" (step {of:,})" if of not in (None, state["step"]) else "")


def description(path: Path) -> str:
    """Describe a checkpoint: its state, the number of its tensors, and its configuration."""
    path = offline.open_checkpoint(path, check_sums=False).path
    state = json.loads((path / names.STATE_FILE).read_text(encoding="utf-8"))
    tensors = {key: math.prod(entry.shape) for key, entry in read_index(path).entries.items()}
    weights = sum(count for key, count in tensors.items() if not key.startswith(NOT_WEIGHTS))
    rest = sum(tensors.values()) - weights
    head = f"{weights:,} weights, {rest:,} other numbers, in {len(tensors):,} tensors"
    config = (path / CONFIG_FILE).read_text(encoding="utf-8")
    return f"{strict_json.dumps(state, indent=2)}\n\n{head}\n\n{config}"


def verify(path: Path) -> int:
    """Compare every file with its checksum and print the damage; return 1 if there is any."""
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; give a run's --save directory or an iter_... in it")
    path = names.newest_checkpoint(path)
    if not any((path / name).exists() for name in (names.STATE_FILE, integrity.CHECKSUMS_FILE)):
        raise UserError(f"{path} holds no complete checkpoint (no iter_... directory); check the directory")
    found: list[str] = []
    try:
        digests = integrity.read_checksums(path)
        for name in track(sorted(digests), "reading", console=Console(stderr=True)):
            found += integrity.find_differences(path, {name: digests[name]}, read=True)
    except ValueError as error:
        found, digests = [str(error)], {}
    for sentence in found:
        print(f"damaged: {sentence}")
    if not found:
        print(f"{path} is intact: {len(digests)} files")
    return 1 if found else 0


def reshard(path: Path, save: Path, *, weights_only: bool) -> None:
    """Rewrite the checkpoint ``path`` to ``save`` as a single process would save it, in the newest format.

    ``save`` must not exist. Only one box at a time is in memory.
    """
    checkpoint = offline.open_checkpoint(path)
    path = checkpoint.path
    if save.exists():
        raise UserError(f"{save} exists already; choose another --save")
    index = offline.open_index(path)
    description = json.loads((path / names.STATE_FILE).read_text(encoding="utf-8"))
    description |= {"format_version": names.FORMAT_VERSION, "train_state": checkpoint.train_state}
    if weights_only:
        description["weights_only"] = True
    elif not checkpoint.weights_only:
        description["updates"] = updates_of(checkpoint)
    config = (path / CONFIG_FILE).read_text(encoding="utf-8")
    with offline.name_checkpoint_in_errors(path):
        offline.write(save, _boxes(index, weights_only), config, description)
    print(f"wrote {save}")


def _boxes(index: Index, weights_only: bool) -> Iterator[Box]:
    """Yield all tensors of a checkpoint, in boxes of the size limit of new checkpoints."""
    pieces = [
        (key, entry, piece)
        for key, entry in index.entries.items()
        if not (weights_only and key.startswith(NOT_WEIGHTS))
        for piece in entry.pieces
    ]
    for key, entry, piece in track(pieces, "writing", console=Console(stderr=True)):
        yield from cut(key, entry.shape, read_piece(index, piece), piece.offset)
