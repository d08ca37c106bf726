"""Reading and writing checkpoints in one process, outside any run: for the tools."""

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mesh.checkpoint import directory as names
from megatron_mesh.checkpoint import integrity, safe
from megatron_mesh.checkpoint.save import complete, make_empty, staged, write_now
from megatron_mesh.checkpoint.writer import plan
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import device


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process, which Megatron-core's checkpoints want; without torch's notes."""
    device.prepare()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's to Megatron-core's authors
            yield
    finally:
        dist.destroy_process_group()


def whole_checkpoint(path: Path, *, check_sums: bool = True) -> names.Checkpoint:
    """The checkpoint at ``path``, or the newest in a run's directory.

    Args:
        path: an iter_... directory, or a run's.
        check_sums: read all of its files, which takes as long as loading it.

    Raises:
        UserError: there is none, or it is unfinished or damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no directory; give a run's --save directory or an iter_... in it")
    path = names.newest(path)
    checkpoint = names.read_checkpoint(path)
    if check_sums and (found := integrity.damage(path)):
        raise UserError(f"{path} is damaged: {'; '.join(found)}; take another checkpoint")
    return checkpoint


def read(path: Path, wanted: Mapping[str, ShardedTensor]) -> dict[str, Any]:
    """Fill tensors, or parts of them, from a checkpoint; plain values come with them. Within ``alone``."""
    return safe.load(dict(wanted), path, validate_access_integrity=False)


def write(save: Path, state: dict[str, Any], config: str, description: dict[str, Any]) -> None:
    """Write a checkpoint to ``save``, at one stroke. Within ``alone``.

    Args:
        state: ShardedTensors, and plain values.
        config: contents of the configuration file.
        description: contents of the state file.

    Raises:
        UserError: the disk will not have it.
    """
    partial = save.with_name(f"{save.name}.partial")
    try:
        make_empty(partial)
        request, common = plan(state, partial)
        write_now(staged(request))
        request.finalize_fns[0]()
        complete(partial, common, config, description)
        partial.rename(save)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = safe.reasons(error) if isinstance(error, CheckpointException) else str(error)
        raise UserError(f"--save {save} cannot be written ({reason}); choose another --save") from error
