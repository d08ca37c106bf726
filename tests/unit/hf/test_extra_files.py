"""The unscaled embedding of an export is stored where no engine looks for weights."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert import tensors
from megatron_mesh.hf.convert.import_model import import_model
from tests.unit.hf.test_logits import load, weights_of


def test_its_place(exported: Callable[..., Any], tmp_path: Path) -> None:
    """Engines load every .safetensors file next to config.json, so only the model's weights may be there."""
    checkpoint, directory, _ = exported(recurrence="vanilla", layers="3")
    assert (directory / tensors.EMBEDDING_FILE).is_file()
    assert [path.name for path in directory.glob("*.safetensors")] == ["model.safetensors"]
    load(directory)  # fails if a tensor is missing or unexpected
    old = shutil.copytree(directory, tmp_path / "old")
    (old / tensors.EMBEDDING_FILE).rename(old / "embedding_before_scaling.safetensors")  # as in early exports
    for place in (directory, old):
        settings = import_model(place, tmp_path / f"back-{place.name}")
        assert settings.scale_embeddings
        before, after = weights_of(checkpoint), weights_of(tmp_path / f"back-{place.name}")
        rows = settings.vocab_size
        name = "embedding.word_embeddings.weight"
        assert torch.equal(before[name][:rows], after[name][:rows])


def test_a_damaged_one(exported: Callable[..., Any], tmp_path: Path) -> None:
    _, directory, _ = exported(recurrence="vanilla", layers="3")
    copy = shutil.copytree(directory, tmp_path / "copy")
    path = copy / tensors.EMBEDDING_FILE
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"cannot read .*embedding_before_scaling\.safetensors"):
        import_model(copy, tmp_path / "out")
