"""Checkpoints of models with nothing at zero, and what Megatron makes of them: to compare exports with."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_mesh.checkpoint.content import TrainState
from megatron_mesh.checkpoint.integrity import Digests, digest, files, sha256, write_checksums
from megatron_mesh.checkpoint.load import load_tensors
from megatron_mesh.checkpoint.offline import open_index
from megatron_mesh.checkpoint.save import Saver
from megatron_mesh.config.schema import Config
from megatron_mesh.model import build_model
from megatron_mesh.parallel import Stage, build_stage
from megatron_mesh.train.optimizer import build_optimizer, build_schedule
from tests.helpers import one_process, randomise, tiny_config

TOKENS = torch.randint(0, 96, (3, 16), generator=torch.Generator().manual_seed(1))


def export_config(save: Path, **settings: Any) -> Config:
    """Settings of a tiny model whose vocabulary (97) is padded to 112."""
    values: dict[str, Any] = {"make_vocab_size_divisible_by": 16, "vocab_size": 97, **settings}
    config = tiny_config(**values)
    return replace(config, checkpoint=replace(config.checkpoint, save=str(save)))


def save_checkpoint(config: Config) -> Path:
    """A checkpoint of a random model, saved as a run saves it (within process groups)."""
    stage = build_stage(config)
    for module in stage.modules:
        randomise(module)
    optimizer = build_optimizer(config, stage)
    state = TrainState(build_schedule(config.optimizer, optimizer), step=3, train_loss=4.5)
    Saver(config).save(stage, optimizer, state)
    return Path(str(config.checkpoint.save)) / "iter_0000003"


def load_weights(stage: Stage, checkpoint: Path, optimizer: Any = None) -> None:
    """Take the weights of a checkpoint (within process groups)."""
    assert load_tensors(open_index(checkpoint), stage, optimizer) == ""


def renew_checksums(checkpoint: Path) -> None:
    """Make the checksums right again after a change to the files."""
    with (checkpoint / ".metadata").open("rb") as file:
        places = {(p.relative_path, p.offset, p.length) for p in pickle.load(file).storage_data.values()}
    known: Digests = {}
    for name, start, length in sorted(places):
        content = (checkpoint / name).read_bytes()[start : start + length]
        known.setdefault(name, []).append((length, sha256(content)))
    small = {path.name: [tuple(digest(path))] for path in files(checkpoint) if path.name not in known}
    write_checksums(checkpoint, known | small)


@torch.no_grad()
def megatron_logits(config: Config) -> torch.Tensor:
    """Logits [B, S, V] of the random model that ``save_checkpoint`` saves."""
    model = build_model(config)
    randomise(model)
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    return model(TOKENS, positions, None).float()


def saved_with_logits(save: Path, **settings: Any) -> tuple[Path, torch.Tensor]:
    """A checkpoint of one process, and the logits [B, S, vocabulary] of its model, without padded ids."""
    config = export_config(save, **settings)
    with one_process(config):
        return save_checkpoint(config), megatron_logits(config)[..., : config.model.vocab_size]
