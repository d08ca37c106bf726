"""The embedding that an export keeps for the way back lies where no engine looks for weights."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mesh.errors import UserError
from megatron_mesh.hf import folding
from megatron_mesh.hf.bring_in import bring_in
from tests.unit.hf.test_logits import load, weights_of


def test_its_place(exported: Callable[..., Any], tmp_path: Path) -> None:
    """Engines load every .safetensors file beside config.json, so the model's own must be all of those."""
    checkpoint, directory, _ = exported(recurrence="vanilla", layers="3")
    assert (directory / folding.FILE).is_file()
    assert [path.name for path in directory.glob("*.safetensors")] == ["model.safetensors"]
    load(directory)  # which finds nothing missing and nothing unexpected
    old = shutil.copytree(directory, tmp_path / "old")
    (old / folding.FILE).rename(old / "embedding_before_scaling.safetensors")  # as earlier exports have it
    for place in (directory, old):
        settings = bring_in(place, tmp_path / f"back-{place.name}")
        assert settings.scale_embeddings
        before, after = weights_of(checkpoint), weights_of(tmp_path / f"back-{place.name}")
        rows = settings.vocab_size
        name = "embedding.word_embeddings.weight"
        assert torch.equal(before[name][:rows], after[name][:rows])


def test_a_damaged_one(exported: Callable[..., Any], tmp_path: Path) -> None:
    _, directory, _ = exported(recurrence="vanilla", layers="3")
    copy = shutil.copytree(directory, tmp_path / "copy")
    path = copy / folding.FILE
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"embedding_before_scaling\.safetensors cannot be read"):
        bring_in(copy, tmp_path / "out")
