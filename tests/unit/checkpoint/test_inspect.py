"""tools/checkpoint.py: lists, verifies, shows and rewrites."""

import errno
from pathlib import Path

import pytest

from megatron_mesh.checkpoint import offline
from megatron_mesh.checkpoint.integrity import find_damage
from megatron_mesh.errors import UserError
from tests.commands import tool
from tests.unit.train.conftest import run

main = tool("checkpoint")


def test_list_and_show(checkpoints, capsys):
    assert main(["list", str(checkpoints)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "2", "4", "6"]
    assert main(["show", str(checkpoints / "iter_0000004")]) == 0
    text = capsys.readouterr().out
    assert '"step": 4' in text and "layers: 1+1R2+1" in text and "weights" in text


def test_list_continues_after_a_damaged_checkpoint(checkpoints, capsys):
    (checkpoints / "iter_0000004" / "state.json").unlink()
    assert main(["list", str(checkpoints)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "2", "4", "6"]
    assert "not a complete checkpoint" in lines[2]


def test_reshard_is_atomic(checkpoints, tmp_path, monkeypatch):
    """A full disk leaves nothing behind, and the remains of a killed rewrite don't block the next one."""
    target, left = tmp_path / "new", tmp_path / "new.partial"
    left.mkdir()
    (left / "half").touch()
    command = ["reshard", str(checkpoints / "iter_0000004"), "--save", str(target)]
    with monkeypatch.context() as patch:
        patch.setattr(offline, "write_file", full_disk)
        with pytest.raises(UserError, match=r"new cannot be written .*No space left on device"):
            main(command)
    assert not target.exists() and not left.exists()
    left.mkdir()
    (left / "half").touch()
    assert main(command) == 0 and find_damage(target) == []


def full_disk(path, boxes):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_verify(checkpoints, capsys):
    newest = checkpoints / "iter_0000006"
    assert main(["verify", str(newest)]) == 0
    assert "is intact: 4 files" in capsys.readouterr().out
    (newest / "state.json").write_bytes(b"x")
    (newest / "__0_0.distcp").unlink()
    assert main(["verify", str(newest)]) == 1
    out = capsys.readouterr().out
    assert "state.json has 1 bytes" in out and "__0_0.distcp is missing" in out and out.count("damaged") == 2


def test_a_run_directory_means_its_newest_checkpoint(checkpoints, tmp_path, capsys):
    assert main(["verify", str(checkpoints)]) == 0
    assert f"{checkpoints / 'iter_0000006'} is intact" in capsys.readouterr().out
    main(["show", str(checkpoints)])
    assert '"step": 6' in capsys.readouterr().out
    for command in ("verify", "show"):
        with pytest.raises(UserError, match=r"no complete checkpoint|not a complete checkpoint"):
            main([command, str(tmp_path)])


def test_a_resharded_checkpoint_resumes_bitwise(tiny, checkpoints, tmp_path):
    expected = run(tiny(load=str(checkpoints / "iter_0000004"))).values("loss")
    assert main(["reshard", str(checkpoints / "iter_0000004"), "--save", str(tmp_path / "new")]) == 0
    assert find_damage(tmp_path / "new") == []
    assert run(tiny(load=str(tmp_path / "new"))).values("loss") == expected


def test_weights_only(tiny, checkpoints, tmp_path):
    target = tmp_path / "weights"
    main(["reshard", str(checkpoints / "iter_0000006"), "--save", str(target), "--weights-only"])
    expected = run(tiny(load=str(checkpoints), finetune=True, train_iters=2)).values("loss")
    assert run(tiny(load=str(target), finetune=True, train_iters=2)).values("loss") == expected
    sizes = [sum(f.stat().st_size for f in d.iterdir()) for d in (target, checkpoints / "iter_0000006")]
    assert sizes[0] < sizes[1] / 2


def test_bad_input(checkpoints, tmp_path):
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        main(["list", str(tmp_path)])
    with pytest.raises(UserError, match="nothing is not a directory"):
        main(["list", str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="exists already"):
        main(["reshard", str(checkpoints / "iter_0000002"), "--save", str(tmp_path)])
    with pytest.raises(UserError, match="not a complete checkpoint"):
        main(["show", str(tmp_path)])


def test_list_takes_a_single_checkpoint(checkpoints, capsys):
    """``list`` takes the directory of a single checkpoint, too."""
    main(["list", str(checkpoints / "iter_0000004")])
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.split()[0] == "4" and line.endswith("iter_0000004")


def test_a_permission_error_is_not_damage(tiny, checkpoints, monkeypatch):
    """There is no fallback to an earlier checkpoint. (Simulated, because root may read everything.)"""
    read_text = Path.read_text

    def refused(path: Path, *args, **kwargs) -> str:
        if path.parent.name == "iter_0000006" and path.suffix == ".json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(UserError, match=r"iter_0000006/.*json cannot be read .*give yourself permission"):
        run(tiny(load=str(checkpoints), train_iters=7, lr_decay_iters=6))
    for command in ("show", "verify", "list"):
        with pytest.raises(UserError, match="json cannot be read: Permission denied"):
            main([command, str(checkpoints)])
