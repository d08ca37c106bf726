"""Reads and writes checkpoints in a single process, outside a run. The tools use this."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_mesh.checkpoint import directory as names
from megatron_mesh.checkpoint import integrity
from megatron_mesh.checkpoint.index import Box, Index, read_index
from megatron_mesh.checkpoint.reader import Damaged
from megatron_mesh.checkpoint.save import make_empty, write_small_files
from megatron_mesh.checkpoint.writer import file_of, write_file
from megatron_mesh.errors import UserError


def open_checkpoint(path: Path, *, check_sums: bool = True) -> names.Checkpoint:
    """Read the description of the checkpoint at ``path``, or of the newest one in a run's directory.

    Args:
        path: an iter_... directory, or a run's directory.
        check_sums: verify file sizes and the checksums of small files. Tensors are verified when they are
            read; for format 2, all files are verified here.

    Raises:
        UserError: there is no checkpoint, or it is incomplete or damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; give a run's --save directory or an iter_... in it")
    path = names.newest_checkpoint(path)
    checkpoint = names.read_checkpoint(path)
    if check_sums and (found := _damage(checkpoint)):
        raise UserError(f"{path} is damaged: {'; '.join(found)}; use another checkpoint")
    return checkpoint


def _damage(checkpoint: names.Checkpoint) -> list[str]:
    if checkpoint.format_version == names.OLD_FORMAT_VERSION:
        return integrity.find_damage(checkpoint.path)
    return integrity.find_cheap_damage(checkpoint.path)


def open_index(path: Path) -> Index:
    """Read the index of the checkpoint ``path``, with checksums that are verified when tensors are read.

    Raises:
        UserError: the index or the checksums are damaged.
    """
    if names.read_checkpoint(path).format_version == names.OLD_FORMAT_VERSION:
        return read_index(path)
    try:
        digests = integrity.read_checksums(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; use another checkpoint") from None
    return read_index(path, digests)


@contextmanager
def name_checkpoint_in_errors(path: Path) -> Iterator[None]:
    """Turn damage found while reading tensors into an error that names the checkpoint ``path``."""
    try:
        yield
    except Damaged as error:
        raise UserError(
            f"{path} is damaged: {error}; use another checkpoint (tools/checkpoint.py list {path.parent})"
        ) from None


def write(save: Path, boxes: Iterable[Box], config: str, description: dict[str, Any]) -> None:
    """Write a checkpoint. ``save`` appears only when it is complete.

    Args:
        save: the directory to write; it must not exist.
        boxes: the tensors. They are consumed one box at a time.
        config: contents of the configuration file.
        description: contents of the state file.

    Raises:
        UserError: the directory cannot be written.
    """
    partial = save.with_name(f"{save.name}.partial")
    try:
        make_empty(partial)
        write_small_files(partial, write_file(partial / file_of(0), boxes), config, description)
        partial.rename(save)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"--save {save} cannot be written ({error}); choose another --save") from error
