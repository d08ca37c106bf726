"""Checkpoints seen from outside a run: lists, descriptions, checks, and copies of other form."""

import json
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from rich.console import Console
from rich.progress import track
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mesh.checkpoint import directory as names
from megatron_mesh.checkpoint import integrity, offline
from megatron_mesh.checkpoint.safe import SafeLoadStrategy, read_metadata
from megatron_mesh.errors import UserError

_NOT_WEIGHTS = ("optimizer.", "rng")


def table(directory: Path) -> str:
    """A line for each complete checkpoint in ``directory``: step, size, training and validation loss.

    One whose description cannot be read is a line that says so.
    """
    rows = [("step", "GiB", "ranks", "train loss", "valid loss", "path")]
    for step, path in names.saved_steps(directory).items():
        try:
            saved = names.read_checkpoint(path)
        except UserError as error:
            rows.append((f"{step:,}", "", "", "", "", str(error)))
            continue
        losses = [saved.train_state[name] for name in ("train_loss", "valid_loss")]
        size = sum(file.stat().st_size for file in integrity.files(path)) / 2**30
        texts = ["" if loss is None else f"{loss:.4f}" for loss in losses]
        rows.append((f"{step:,}", f"{size:,.2f}", str(saved.world_size), texts[0], texts[1], str(path)))
    if len(rows) == 1:
        raise UserError(f"{directory} holds no complete checkpoint (no iter_...); check the directory")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row[:-1], widths, strict=False)) for row in rows]
    return "\n".join(f"{line}  {row[-1]}" for line, row in zip(lines, rows, strict=True))


def description(path: Path) -> str:
    """What a checkpoint holds: its state, the number of its tensors, its configuration."""
    path = offline.whole_checkpoint(path, check_sums=False).path
    state = json.loads((path / names.STATE_FILE).read_text(encoding="utf-8"))
    tensors = {
        key: entry.size.numel()
        for key, entry in read_metadata(path).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    weights = sum(count for key, count in tensors.items() if not key.startswith(_NOT_WEIGHTS))
    rest = sum(tensors.values()) - weights
    head = f"{weights:,} weights, {rest:,} other numbers, in {len(tensors):,} tensors"
    config = (path / names.CONFIG_FILE).read_text(encoding="utf-8")
    return f"{json.dumps(state, indent=2)}\n\n{head}\n\n{config}"


def verify(path: Path) -> int:
    """Compare every file with its checksum and print what is wrong; returns 1 if something is."""
    if not path.is_dir():
        raise UserError(f"{path} is no directory; give a run's --save directory or an iter_... in it")
    path = names.newest(path)
    if not any((path / name).exists() for name in (names.STATE_FILE, integrity.CHECKSUMS_FILE)):
        raise UserError(f"{path} holds no complete checkpoint (no iter_...); check the directory")
    listed = integrity.files(path)
    found: list[str] = []
    for share in track(range(len(listed)), "reading", console=Console(stderr=True)):
        found += integrity.damage(path, share, len(listed))
    for sentence in dict.fromkeys(found):
        print(f"damaged: {sentence}")
    if not found:
        print(f"{path} is whole: {len(listed)} files")
    return 1 if found else 0


def reshard(path: Path, save: Path, *, weights_only: bool) -> None:
    """Write the checkpoint ``path`` anew from one process to ``save``, which must not exist.

    Needs as much host memory as it writes.
    """
    path = offline.whole_checkpoint(path).path
    if save.exists():
        raise UserError(f"{save} exists already; choose another --save")
    with offline.alone():
        _copy(path, save, weights_only)
    print(f"wrote {save}")


def _copy(path: Path, save: Path, weights_only: bool) -> None:
    wanted = SafeLoadStrategy().load_tensors_metadata(path)
    if weights_only:
        wanted = {key: tensor for key, tensor in wanted.items() if not key.startswith(_NOT_WEIGHTS)}
    state: dict[str, Any] = offline.read(path, wanted)
    plain = {key: value for key, value in state.items() if key not in wanted}
    description = json.loads((path / names.STATE_FILE).read_text(encoding="utf-8"))
    if weights_only:
        plain.pop("optimizer", None)
        description["weights_only"] = True
    tensors = {
        key: ShardedTensor.from_rank_offsets(key, state[key].contiguous())
        for key in wanted
        if isinstance(state[key], torch.Tensor)
    }
    config = (path / names.CONFIG_FILE).read_text(encoding="utf-8")
    offline.write(save, {**plain, **tensors}, config, description)
