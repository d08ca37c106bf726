"""Nothing in a checkpoint can run code, wherever it is planted; even with checksums that are right."""

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

from megatron_mesh.checkpoint.integrity import CHECKSUMS_FILE, write_checksums
from megatron_mesh.checkpoint.safe import read_metadata
from megatron_mesh.errors import UserError
from tests.unit.train.conftest import run


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


def plant_in_common(newest: Path, bomb: Bomb) -> None:
    torch.save({"optimizer": bomb}, newest / "common.pt")


def plant_in_tensors(newest: Path, bomb: Bomb) -> None:
    """In the place of every tensor."""
    buffer = io.BytesIO()
    torch.save(bomb, buffer)
    (newest / "__0_0.distcp").write_bytes(buffer.getvalue())
    metadata = read_metadata(newest)
    for place in metadata.storage_data.values():
        place.relative_path, place.offset, place.length = "__0_0.distcp", 0, len(buffer.getvalue())
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_an_object(newest: Path, bomb: Bomb) -> None:
    """A Megatron ShardedObject, stored as bytes, in place of a tensor of the same name."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    plant_in_tensors(newest, bomb)
    metadata = read_metadata(newest)
    for key in list(metadata.state_dict_metadata):
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_in_yaml(newest: Path, bomb: Bomb) -> None:
    text = (newest / "config.yaml").read_text()
    (newest / "config.yaml").write_text(f"{text}\nseed: !!python/object/apply:os.mkdir ['{bomb.mark}']\n")


REFUSALS = {
    plant_in_metadata: "names posix.mkdir, which no checkpoint needs",
    plant_in_common: "common.pt cannot be trusted: it holds more than tensors",
    plant_in_tensors: "iter_0000006 cannot be read: it holds more than tensors",
    plant_an_object: "BytesStorageMetadata",
    plant_in_yaml: "could not determine a constructor",
}


def with_right_checksums(newest: Path) -> None:
    (newest / CHECKSUMS_FILE).unlink()
    write_checksums(newest, {})


@pytest.mark.parametrize("plant", REFUSALS)
def test_a_planted_pickle_does_not_run(tiny, checkpoints, plant, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # some libraries' advice
    newest = checkpoints / "iter_0000006"
    mark = tmp_path / "it-ran"
    plant(newest, Bomb(mark))
    with_right_checksums(newest)
    with pytest.raises(UserError, match=REFUSALS[plant]):
        run(tiny(load=str(newest)))
    assert not mark.exists()


def test_nothing_is_loaded_that_trusts_its_contents(tiny, checkpoints):
    """Megatron-core has torch allow NumPy's arrays, whose pickles may hold addresses."""
    newest = checkpoints / "iter_0000006"
    torch.save({"optimizer": np.zeros(3, np.uint32)}, newest / "common.pt")
    assert torch.load(newest / "common.pt", weights_only=True)["optimizer"].shape == (3,)
    with_right_checksums(newest)
    with pytest.raises(UserError, match="it holds more than tensors and plain values"):
        run(tiny(load=str(newest)))


STOCK_READERS = {
    plant_in_metadata: lambda newest: FileSystemReader(newest).read_metadata(),
    plant_in_common: lambda newest: TorchCommonLoadStrategy().load_common(newest),
    plant_in_tensors: lambda newest: torch.load(newest / "__0_0.distcp"),
}


@pytest.mark.parametrize("plant", STOCK_READERS)
@pytest.mark.filterwarnings("ignore:Environment variable")
def test_a_stock_reader_would_run_it(checkpoints, plant, tmp_path, monkeypatch):
    """The test above tests something."""
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
    with pytest.raises(UserError, match="names a file elsewhere"):
        read_metadata(newest)


def test_only_tensors_are_stored(checkpoints):
    """No object of Megatron's, and no zip entry of a pickle but torch's own lists of tensors."""
    metadata = read_metadata(checkpoints / "iter_0000006")
    kinds = {type(entry).__name__ for entry in metadata.state_dict_metadata.values()}
    assert kinds == {"TensorStorageMetadata"}
    with zipfile.ZipFile(checkpoints / "iter_0000006" / "common.pt") as file:
        assert len([name for name in file.namelist() if name.endswith("data.pkl")]) == 1
