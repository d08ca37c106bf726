"""``replace_text`` leaves the old text or the new one, even after an error."""

import os
from pathlib import Path

import pytest

from megatron_mesh.runtime.run_files import replace_text


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "results.json"
    replace_text(path, "old")
    replace_text(path, "new")
    assert path.read_text() == "new"

    def fails(*names: object) -> None:
        raise OSError("stale file handle")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="stale"):
        replace_text(path, "newest")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["results.json"]


def test_a_full_disk_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "status.txt"
    path.write_text("running")
    (tmp_path / "status.txt.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        replace_text(path, "done")
    assert path.read_text() == "running" and os.listdir(tmp_path) == ["status.txt"]
