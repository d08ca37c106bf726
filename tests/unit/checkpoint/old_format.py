"""Writes checkpoints of format 2, as earlier versions did through Megatron-core."""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

from megatron_mesh.checkpoint.integrity import digest, files, sha256
from megatron_mesh.checkpoint.save import Saver, describe_state
from megatron_mesh.checkpoint.shares import only_member
from megatron_mesh.config.settings import dump_config
from megatron_mesh.runtime.device import pack_generators
from megatron_mesh.runtime.run_files import checkpoint_path


def save(saver: Saver, stage: Any, optimizer: Any, state: Any) -> None:
    """Replaces ``Saver.save`` in a run of one process."""
    directory = checkpoint_path(saver.directory, state.step)
    directory.mkdir(parents=True)
    weights = {
        chunk: {name: value for name, value in part.items() if not isinstance(value, ShardedObject)}
        for chunk, part in stage.sharded_state_dict().items()
    }
    place = (0, dist.get_rank(), dist.get_world_size())
    content = {
        "model": weights,
        "optimizer": only_member(optimizer).sharded_state_dict(weights),
        "rng": ShardedTensor.from_rank_offsets("rng", pack_generators(), place),
    }
    dist_checkpointing.save(content, str(directory))
    (directory / "config.yaml").write_text(dump_config(saver.config))
    described = {**describe_state(state.state_dict()), "format_version": 2}
    (directory / "state.json").write_text(json.dumps(described))
    write_checksums(directory)


def write_checksums(directory: Path) -> None:
    """Write one checksum per file."""
    listed = {path.name: digest(path) for path in files(directory)}
    own = sha256(json.dumps(listed, sort_keys=True).encode())
    text = json.dumps({"algorithm": "sha256", "files": listed, "sha256_of_files": own})
    (directory / "checksums.json").write_text(text)
