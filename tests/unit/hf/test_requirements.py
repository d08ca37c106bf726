"""Our tools and our exports report an unsupported version of transformers, and what to do."""

import importlib.metadata
import shutil
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from megatron_mesh.errors import UserError
from tests.commands import tool

TOOLS = {
    "convert_to_hf": ["--load", "nowhere", "--save", "nowhere-else"],
    "convert_from_hf": ["--load", "nowhere", "--save", "nowhere-else"],
    "generate": ["--model", "nowhere", "--prompt", "x"],
}


@pytest.fixture
def old_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "4.49.0" if name == "transformers" else real(name)
    )


@pytest.mark.parametrize("name", TOOLS)
def test_tools(old_transformers: None, name: str) -> None:
    main = tool(name)
    with pytest.raises(UserError, match=r"4\.49\.0 is too old; 4\.57 or newer is needed: pip install"):
        main(TOOLS[name])


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    main = tool("convert_to_hf")
    with pytest.raises(UserError, match=r"transformers is not installed: pip install 'megatron_mesh\[hf\]'"):
        main(TOOLS["convert_to_hf"])


def test_the_code_of_an_export(exported, old_transformers: None, tmp_path: Path) -> None:
    """The check is in its configuration file, which transformers imports first."""
    directory = shutil.copytree(exported()[1], tmp_path / "for-old-transformers")
    with pytest.raises(
        ImportError, match=r"found transformers==4\.49\.0\.\s.*pip install 'transformers>=4\.57'"
    ):
        get_class_from_dynamic_module("configuration_mesh.MeshConfig", str(directory))
