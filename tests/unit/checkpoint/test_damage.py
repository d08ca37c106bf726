"""Whatever happens to a file of a checkpoint is noticed, named, and survived."""

import errno
from pathlib import Path

import pytest

from megatron_mesh.checkpoint import integrity
from megatron_mesh.checkpoint.integrity import damage
from megatron_mesh.errors import UserError
from tests.unit.train.conftest import run


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


HARM = {"flipped": flip, "truncated": truncate, "deleted": Path.unlink}
FILES = [".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt", "config.yaml", "metadata.json"]
FILES += ["state.json"]


def test_a_checkpoint_has_these_files_and_is_whole(checkpoints):
    newest = checkpoints / "iter_0000006"
    assert sorted(path.name for path in newest.iterdir()) == sorted([*FILES, "checksums.json"])
    assert damage(newest) == []


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named(checkpoints, name, harm):
    newest = checkpoints / "iter_0000006"
    HARM[harm](newest / name)
    (found,) = damage(newest)
    assert name in found


def test_shares_together_see_everything(checkpoints):
    newest = checkpoints / "iter_0000006"
    for name in FILES:
        flip(newest / name)
    seen = [sentence for share in range(3) for sentence in damage(newest, share, 3)]
    assert len(seen) == len(set(seen)) == len(FILES)


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "checksums.json"])
def test_the_one_before_is_used(tiny, straight, checkpoints, name, harm, caplog):
    HARM[harm](checkpoints / "iter_0000006" / name)
    outcome = run(tiny(load=str(checkpoints)))
    assert outcome.values("loss") == straight.values("loss")[4:]
    assert "iter_0000006 is damaged" in caplog.text and name in caplog.text


def test_a_foreign_file_is_noticed(tiny, checkpoints):
    (checkpoints / "iter_0000006" / "__7_0.distcp").write_bytes(b"foreign")
    with pytest.raises(UserError, match=r"__7_0.distcp is not part of it.*--no-load-fallback"):
        run(tiny(load=str(checkpoints), load_fallback=False))
    assert len(run(tiny(load=str(checkpoints))).values("loss")) == 2


def test_a_file_that_cannot_be_read_is_damage_too(tiny, checkpoints, monkeypatch, caplog):
    original = integrity.digest

    def bad_sector(path: Path) -> list:
        if path.match("iter_0000006/__0_0.distcp"):
            raise OSError(errno.EIO, "Input/output error")
        return original(path)

    monkeypatch.setattr(integrity, "digest", bad_sector)
    assert len(run(tiny(load=str(checkpoints))).values("loss")) == 2
    assert "iter_0000006 is damaged: __0_0.distcp cannot be read (Input/output error)" in caplog.text


def test_every_file_is_read_once(tiny, checkpoints, monkeypatch):
    read = []
    original = integrity.digest
    monkeypatch.setattr(integrity, "digest", lambda path: read.append(path) or original(path))
    for path in checkpoints.glob("iter_*"):
        flip(path / "common.pt")
    with pytest.raises(UserError, match="no earlier one is whole"):
        run(tiny(load=str(checkpoints)))
    assert sorted(read) == sorted(path for path in checkpoints.glob("iter_*/*") if path.name in FILES)


def test_nothing_whole_is_an_error_that_says_so(tiny, checkpoints):
    for path in checkpoints.glob("iter_*"):
        flip(path / "common.pt")
    with pytest.raises(UserError, match=r"iter_0000006 is damaged \(common.pt .*no earlier one is whole"):
        run(tiny(load=str(checkpoints)))
