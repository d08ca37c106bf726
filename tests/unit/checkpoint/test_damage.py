"""Any damage to a file of a checkpoint is detected and reported, and the run falls back to an earlier one."""

import errno
import hashlib
import os
import re
import shutil
from pathlib import Path

import pytest

from megatron_mesh.checkpoint import integrity
from megatron_mesh.checkpoint.index import read_index
from megatron_mesh.checkpoint.integrity import find_damage
from megatron_mesh.errors import UserError
from tests.commands import tool
from tests.unit.train.conftest import run

main = tool("checkpoint")


def flip(path: Path) -> None:
    """Flip one bit in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


HARM = {"flipped": flip, "truncated": truncate, "deleted": Path.unlink}
FILES = [".metadata", "__0_0.distcp", "config.yaml", "state.json"]


def test_an_intact_checkpoint_has_these_files(checkpoints):
    newest = checkpoints / "iter_0000006"
    assert sorted(path.name for path in newest.iterdir()) == sorted([*FILES, "checksums.json"])
    assert find_damage(newest) == []


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_reported(checkpoints, name, harm):
    newest = checkpoints / "iter_0000006"
    HARM[harm](newest / name)
    (found,) = find_damage(newest)
    assert name in found


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "checksums.json"])
def test_the_previous_checkpoint_is_used(tiny, straight, checkpoints, name, harm, caplog):
    HARM[harm](checkpoints / "iter_0000006" / name)
    outcome = run(tiny(load=str(checkpoints)))
    assert outcome.values("loss") == straight.values("loss")[4:]
    assert "iter_0000006 is damaged" in caplog.text and name in caplog.text


FOREIGN = [".nfs000000000004a2b100000001", ".DS_Store", "README.md", "__7_0.distcp"]


def test_foreign_files_are_ignored(tiny, straight, checkpoints, capsys):
    for name in FOREIGN:
        (checkpoints / name).write_bytes(b"foreign")
        (checkpoints / "iter_0000004" / name).write_bytes(b"foreign")
    (checkpoints / "iter_0000009").write_bytes(b"a file of that name")
    shutil.rmtree(checkpoints / "iter_0000006")
    assert find_damage(checkpoints / "iter_0000004") == []
    assert main(["verify", str(checkpoints)]) == 0 and main(["list", str(checkpoints)]) == 0
    assert run(tiny(load=str(checkpoints))).values("loss") == straight.values("loss")[4:]


def test_a_file_that_cannot_be_read_is_damage_too(tiny, checkpoints, monkeypatch, caplog):
    original = os.pread

    def bad_sector(handle: int, length: int, start: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{handle}").endswith("iter_0000006/__0_0.distcp"):
            raise OSError(errno.EIO, "Input/output error")
        return original(handle, length, start)

    monkeypatch.setattr(os, "pread", bad_sector)
    assert len(run(tiny(load=str(checkpoints))).values("loss")) == 2
    assert re.search(r"iter_0000006 is damaged: .*__0_0.distcp cannot be read \(Input/output", caplog.text)


def test_every_piece_is_read_once_and_no_other_checkpoint(tiny, checkpoints, monkeypatch):
    """Tensors are verified while they are loaded, so nothing is read twice."""
    read: dict[str, list[tuple[int, int]]] = {}
    original = os.pread

    def counted(handle: int, length: int, start: int) -> bytes:
        read.setdefault(os.readlink(f"/proc/self/fd/{handle}"), []).append((start, length))
        return original(handle, length, start)

    monkeypatch.setattr(os, "pread", counted)
    run(tiny(load=str(checkpoints)))
    (path,) = read
    assert path == str(checkpoints / "iter_0000006" / "__0_0.distcp")
    index = read_index(Path(path).parent)
    pieces = sorted((p.start, p.length) for entry in index.entries.values() for p in entry.pieces)
    assert sorted(read[path]) == pieces


def test_a_piece_is_read_in_parts(tiny, straight, checkpoints, monkeypatch):
    """The system reads at most 2 GiB at once."""
    original = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, length, start: original(handle, min(length, 999), start))
    path = checkpoints / "iter_0000004"
    assert run(tiny(load=str(path))).values("loss") == straight.values("loss")[4:]


def test_verifying_a_file_reads_it_in_blocks(checkpoints, monkeypatch):
    monkeypatch.setattr(integrity, "_BLOCK", 999)
    newest, sizes = checkpoints / "iter_0000006", []
    original = hashlib.sha256

    class Watched:
        def __init__(self) -> None:
            self.hash = original()

        def update(self, block: bytes) -> None:
            sizes.append(len(block))
            self.hash.update(block)

        def hexdigest(self) -> str:
            return self.hash.hexdigest()

    with monkeypatch.context() as patch:
        digests = integrity.read_checksums(newest)
        patch.setattr(hashlib, "sha256", Watched)
        assert integrity.find_differences(newest, digests, read=True) == []
    assert max(sizes) == 999 and sum(sizes) == sum(length for d in digests.values() for length, _ in d)


def test_checksums_are_computed_while_writing(tiny, tmp_path, monkeypatch):
    opened = []
    original = Path.open

    def watched(path: Path, mode: str = "r", *arguments, **more):
        if path.parent.name.startswith("iter_"):
            opened.append((path.name, mode))
        return original(path, mode, *arguments, **more)

    monkeypatch.setattr(Path, "open", watched)
    run(tiny(save=str(tmp_path), save_interval=3))
    assert opened.count(("__0_0.distcp", "xb")) == 2
    assert len(opened) == 2 * (len(FILES) + 1) and not [name for name, mode in opened if "r" in mode]


def test_no_intact_checkpoint_is_an_error(tiny, checkpoints):
    for path in checkpoints.glob("iter_*"):
        flip(path / "state.json")
    with pytest.raises(UserError, match=r"iter_0000006 is damaged \(state.json .*no earlier one is intact"):
        run(tiny(load=str(checkpoints)))
