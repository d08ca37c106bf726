"""Checkpoints of format 2 still load, and one command converts them to the new format."""

from pathlib import Path

import pytest

from megatron_mesh.checkpoint import save as save_module
from megatron_mesh.checkpoint.integrity import find_damage
from megatron_mesh.errors import UserError
from tests.commands import tool
from tests.unit.checkpoint import old_format
from tests.unit.train import fused_adam
from tests.unit.train.conftest import run

main = tool("checkpoint")


@pytest.fixture
def old(tiny, tmp_path, monkeypatch):
    """The losses of a run, and its directory with old-format checkpoints of steps 3 and 6."""

    def make(**settings) -> tuple[list[float], Path]:
        with monkeypatch.context() as patch:
            patch.setattr(save_module.Saver, "save", old_format.save)
            outcome = run(tiny(save=str(tmp_path / "old"), save_interval=3, **settings))
        return outcome.values("loss"), tmp_path / "old"

    return make


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("adam", ["torch's", "fused"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_it_resumes_bitwise(tiny, old, tmp_path, monkeypatch, bf16, adam):
    if adam == "fused":
        fused_adam.install(monkeypatch)
    losses, directory = old(bf16=bf16)
    assert find_damage(directory / "iter_0000003") == []
    resumed = run(tiny(load=str(directory / "iter_0000003"), bf16=bf16))
    assert resumed.values("loss") == losses[3:]
    assert main(["reshard", str(directory / "iter_0000003"), "--save", str(tmp_path / "new")]) == 0
    assert not (tmp_path / "new" / "common.pt").exists()
    assert run(tiny(load=str(tmp_path / "new"), bf16=bf16)).values("loss") == losses[3:]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["__0_0.distcp", "common.pt"])
def test_damage_is_found_before_anything_is_read(tiny, old, name, caplog):
    losses, directory = old()
    path = directory / "iter_0000006" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert run(tiny(load=str(directory))).values("loss") == losses[3:]
    assert "iter_0000006 is damaged" in caplog.text and name in caplog.text
    with pytest.raises(UserError, match=f"is damaged: {name}"):
        main(["reshard", str(directory), "--save", str(directory / "new")])
