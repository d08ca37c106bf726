"""Nothing in a checkpoint can run code, wherever it is planted; even with checksums that are right."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
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
    """In the place of a tensor, within its bytes."""
    path = newest / "__0_0.distcp"
    torch.save(bomb, newest / "bomb.pt")
    bomb_bytes = (newest / "bomb.pt").read_bytes()
    (newest / "bomb.pt").unlink()
    metadata = read_metadata(newest)
    largest = max(
        (place for place in metadata.storage_data.values() if place.relative_path == path.name),
        key=lambda place: place.length,
    )
    assert len(bomb_bytes) <= largest.length
    content = bytearray(path.read_bytes())
    # The zip directory of the bomb must be the last that a reader sees.
    content[largest.offset : largest.offset + largest.length] = bomb_bytes.rjust(largest.length, b"\0")
    path.write_bytes(content)


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


@pytest.mark.parametrize(
    "plant", [plant_in_metadata, plant_in_common, plant_in_tensors, plant_an_object, plant_in_yaml]
)
def test_a_planted_pickle_does_not_run(tiny, checkpoints, plant, tmp_path):
    newest = checkpoints / "iter_0000006"
    mark = tmp_path / "it-ran"
    plant(newest, Bomb(mark))
    (newest / CHECKSUMS_FILE).unlink()
    write_checksums(newest, {})
    with pytest.raises((UserError, pickle.UnpicklingError, RuntimeError, Exception)):
        run(tiny(load=str(newest), train_iters=7))
    assert not mark.exists()


def test_the_stock_reader_would_run_it(checkpoints, tmp_path):
    """The test above tests something."""
    newest = checkpoints / "iter_0000006"
    mark = tmp_path / "it-ran"
    plant_in_metadata(newest, Bomb(mark))
    FileSystemReader(newest).read_metadata()
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
