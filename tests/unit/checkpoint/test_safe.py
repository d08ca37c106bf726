"""Code planted anywhere in a checkpoint does not run, even if the checksums are right."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_mesh.checkpoint import save as save_module
from megatron_mesh.checkpoint.index import read_index
from megatron_mesh.errors import UserError
from tests.exports import renew_checksums
from tests.unit.checkpoint import old_format
from tests.unit.train.conftest import run


def read_metadata(newest: Path) -> Metadata:
    return pickle.loads((newest / ".metadata").read_bytes())  # written by this test's own run


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def plant_in_metadata(newest: Path, bomb: Bomb) -> None:
    metadata = read_metadata(newest)
    metadata.planner_data = bomb
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_in_tensors(newest: Path, bomb: Bomb) -> None:
    """Replace every tensor with the bomb."""
    buffer = io.BytesIO()
    torch.save(bomb, buffer)
    (newest / "__0_0.distcp").write_bytes(buffer.getvalue())
    metadata = read_metadata(newest)
    for place in metadata.storage_data.values():
        place.relative_path, place.offset, place.length = "__0_0.distcp", 0, len(buffer.getvalue())
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_an_object(newest: Path, bomb: Bomb) -> None:
    """Replace a tensor by a Megatron ShardedObject of the same name, stored as bytes."""
    plant_in_tensors(newest, bomb)
    metadata = read_metadata(newest)
    for key in list(metadata.state_dict_metadata):
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_in_yaml(newest: Path, bomb: Bomb) -> None:
    lines = (newest / "config.yaml").read_text().splitlines()
    others = "\n".join(line for line in lines if not line.startswith("seed:"))
    (newest / "config.yaml").write_text(f"{others}\nseed: !!python/object/apply:os.mkdir ['{bomb.mark}']\n")


REFUSALS = {
    plant_in_metadata: "refers to posix.mkdir, which no checkpoint needs",
    plant_in_tensors: "__0_0.distcp cannot be trusted: it holds more than tensors",
    plant_an_object: "it is not a list of tensors",
    plant_in_yaml: "could not determine a constructor",
}


@pytest.mark.parametrize("plant", REFUSALS)
def test_a_planted_pickle_does_not_run(tiny, checkpoints, plant, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # some libraries' advice
    newest = checkpoints / "iter_0000006"
    mark = tmp_path / "it-ran"
    plant(newest, Bomb(mark))
    renew_checksums(newest)
    if mark.exists():  # this test's own reading ran it
        mark.rmdir()
    with pytest.raises(UserError, match=REFUSALS[plant]):
        run(tiny(load=str(newest)))
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("planted", ["a class", "an array"])
def test_plain_values_of_the_old_format(tiny, tmp_path, monkeypatch, planted):
    """Megatron-core makes torch allow NumPy arrays, whose pickles may hold memory addresses. We don't."""
    mark = tmp_path / "it-ran"
    with monkeypatch.context() as patch:
        patch.setattr(save_module.Saver, "save", old_format.save)
        run(tiny(save=str(tmp_path), save_interval=6))
    newest = tmp_path / "iter_0000006"
    value = Bomb(mark) if planted == "a class" else np.zeros(3, np.uint32)
    torch.save({"optimizer": value}, newest / "common.pt")
    old_format.write_checksums(newest)
    with pytest.raises(UserError, match="it holds more than tensors and plain values"):
        run(tiny(load=str(newest)))
    assert not mark.exists()
    if planted == "an array":
        assert torch.load(newest / "common.pt", weights_only=True)["optimizer"].shape == (3,)
    else:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        TorchCommonLoadStrategy().load_common(newest)
        assert mark.exists()


STOCK_READERS = {
    plant_in_metadata: lambda newest: FileSystemReader(newest).read_metadata(),
    plant_in_tensors: lambda newest: torch.load(newest / "__0_0.distcp"),
}


@pytest.mark.parametrize("plant", STOCK_READERS)
@pytest.mark.filterwarnings("ignore:Environment variable")
def test_a_stock_reader_would_run_it(checkpoints, plant, tmp_path, monkeypatch):
    """The planted code would run in a reader that is not safe, so the test above can fail."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    newest = checkpoints / "iter_0000006"
    mark = tmp_path / "it-ran"
    plant(newest, Bomb(mark))
    STOCK_READERS[plant](newest)
    assert mark.exists()


def test_a_path_outside_is_refused(checkpoints):
    newest = checkpoints / "iter_0000006"
    metadata = read_metadata(newest)
    next(iter(metadata.storage_data.values())).relative_path = "../iter_0000004/__0_0.distcp"
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="refers to a file outside the checkpoint"):
        read_index(newest)


def test_only_tensors_are_stored(checkpoints):
    """There are no Megatron objects: every pickle in the file is torch's pickle of one tensor."""
    newest = checkpoints / "iter_0000006"
    metadata = read_metadata(newest)
    kinds = {type(entry).__name__ for entry in metadata.state_dict_metadata.values()}
    assert kinds == {"TensorStorageMetadata"}
    content = (newest / "__0_0.distcp").read_bytes()
    for place in metadata.storage_data.values():
        piece = io.BytesIO(content[place.offset : place.offset + place.length])
        assert isinstance(torch.load(piece, weights_only=True), torch.Tensor)
        with zipfile.ZipFile(piece) as file:
            assert len([name for name in file.namelist() if name.endswith("data.pkl")]) == 1
