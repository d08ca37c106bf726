"""The code in an export is complete, and edits to it are detected."""

import ast
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

import megatron_mesh
from megatron_mesh.hf.convert import ship

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
    """transformers 4 copies the files that the main files import, but not those that these import."""
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


ALLOWED = {"torch", "transformers", "packaging", "sentencepiece"}


def test_an_export_needs_torch_and_transformers_alone() -> None:
    """transformers requires packaging. Only exports with our tokenizer need sentencepiece."""
    for name, text in {**ship.sources(), **ship.tokenizer_source()}.items():
        imported = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).split(".")[0])
        assert imported - sys.stdlib_module_names <= ALLOWED, name


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose modeling file imports a chain of files, in nested folders."""
    texts = {
        "hf/modeling/configuration_mesh.py": "import transformers\n",
        "hf/modeling/modeling_mesh.py": "from megatron_mesh.hf.modeling.attention import A\n",
        "hf/modeling/attention.py": "def f():\n    from megatron_mesh.recurrence.schemes import SCHEMES\n",
        "hf/modeling/other.py": "",
        "recurrence/schemes.py": "import torch\n\nfrom .mixing import x\n",
        "recurrence/mixing.py": "from .schemes import SCHEMES\n",
        "hf/convert/export.py": "",
    }
    root = tmp_path / "megatron_mesh"
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(ship, "_ROOT", root)
    monkeypatch.setattr(ship, "_MODELING", root / "hf/modeling")
    monkeypatch.setattr(ship, "_FOLDERS", (root / "hf/modeling", root / "recurrence"))
    return root


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
        "import megatron_mesh.hf.modeling.attention",
        "from megatron_mesh.errors import UserError",
        "from megatron_mesh.hf.convert.export import export_checkpoint",
        "from megatron_mesh.recurrence import SCHEMES",
        "from megatron_mesh.hf.modeling.nowhere import x",
        "from . import attention",
    ],
)
def test_imports_that_an_export_cannot_have(package: Path, line: str) -> None:
    (package / "hf/modeling/attention.py").write_text(line)
    message = r"attention\.py imports megatron_mesh\..*, which cannot be shipped: write 'from megatron_mesh\."
    with pytest.raises(ValueError, match=message):
        ship.sources()


def test_two_files_of_one_name(package: Path) -> None:
    (package / "hf/modeling/mixing.py").write_text("")
    (package / "hf/modeling/modeling_mesh.py").write_text(
        "from megatron_mesh.hf.modeling.mixing import x\nfrom megatron_mesh.recurrence.mixing import x\n"
    )
    with pytest.raises(ValueError, match="cannot be shipped together"):
        ship.sources()
