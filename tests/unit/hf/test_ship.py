"""The code of an export is complete, and knows whether it was edited."""

import ast
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

import megatron_mesh
from megatron_mesh.hf import ship

PACKAGE = Path(megatron_mesh.__file__).parent


def test_the_auto_classes_are_there() -> None:
    texts = ship.sources()
    for entry in ship.AUTO_MAP.values():
        module, name = entry.split(".")
        classes = [
            node.name for node in ast.parse(texts[f"{module}.py"]).body if isinstance(node, ast.ClassDef)
        ]
        assert name in classes, entry


def test_transformers_4_copies_every_file(tmp_path: Path) -> None:
    """It copies the files that a file names, and not those that these name in turn."""
    texts = ship.sources()
    named = {entry.split(".")[0] for entry in ship.AUTO_MAP.values()}
    for module in list(named):
        (tmp_path / f"{module}.py").write_text(texts[f"{module}.py"])
        named |= set(get_relative_imports(tmp_path / f"{module}.py"))
    assert {f"{name}.py" for name in named} == set(texts)


def test_edits_are_noticed() -> None:
    for name, text in ship.sources().items():
        assert ship.read_header(text) == (megatron_mesh.__version__, True), name
        assert ship.read_header(text + "\n# mine") == (megatron_mesh.__version__, False)
        assert ship.read_header(text.partition("\n")[2]) is None
    assert ship.read_header("# Part of megatron_mesh 0.1.0 (Apache-2.0).\nx = 1\n") == ("0.1.0", None)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose modeling file imports over three files."""
    texts = {
        "hf/configuration_mesh.py": "import transformers\n",
        "hf/modeling_mesh.py": "from megatron_mesh.hf.attention import A\n",
        "hf/attention.py": "def f():\n    from megatron_mesh.recurrence.schemes import SCHEMES\nA = f()\n",
        "recurrence/schemes.py": "import torch\n\nfrom .mixing import x\n",
        "recurrence/mixing.py": "from .schemes import SCHEMES\n",
        "hf/other.py": "",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(ship, "_ROOT", tmp_path)
    return tmp_path


def test_files_are_found_by_their_imports(package: Path) -> None:
    texts = ship.sources()
    assert set(texts) == {
        "configuration_mesh.py",
        "modeling_mesh.py",
        "attention.py",
        "schemes.py",
        "mixing.py",
    }
    assert list(texts)[-1] == "modeling_mesh.py", "after what it imports"
    assert "    from .schemes import SCHEMES\n" in texts["attention.py"]
    assert texts["modeling_mesh.py"].endswith("\nfrom .attention import A\n")


@pytest.mark.parametrize(
    "line",
    [
        "import megatron_mesh.hf.attention",
        "from megatron_mesh.errors import UserError",
        "from megatron_mesh.recurrence import SCHEMES",
        "from megatron_mesh.hf.nowhere import x",
        "from . import attention",
    ],
)
def test_imports_that_an_export_cannot_have(package: Path, line: str) -> None:
    (package / "hf/attention.py").write_text(line)
    with pytest.raises(
        ValueError, match=r"attention\.py imports megatron_mesh\..*: write 'from megatron_mesh\.hf"
    ):
        ship.sources()


def test_two_files_of_one_name(package: Path) -> None:
    (package / "hf/mixing.py").write_text("")
    (package / "hf/modeling_mesh.py").write_text(
        "from megatron_mesh.hf.mixing import x\nfrom megatron_mesh.recurrence.mixing import x\n"
    )
    with pytest.raises(ValueError, match="cannot be shipped together"):
        ship.sources()
