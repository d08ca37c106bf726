"""Tools and exports report that transformers is missing or too old, and what to do."""

import importlib.metadata
import shutil
import subprocess
import sys
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
def test_tools_refuse_an_old_version(old_transformers: None, name: str) -> None:
    main = tool(name)
    with pytest.raises(UserError, match=r"4\.49\.0 is too old; 4\.57 or newer is needed: pip install"):
        main(TOOLS[name])


def test_tools_say_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    main = tool("convert_to_hf")
    with pytest.raises(UserError, match=r"transformers is not installed: pip install 'megatron_mesh\[hf\]'"):
        main(TOOLS["convert_to_hf"])


def test_the_check_needs_no_transformers() -> None:
    """A tool imports the check before anything that imports transformers."""
    code = """
import sys
sys.modules["transformers"] = None  # its import fails
from megatron_mesh.hf.convert.open_model import check_transformers
import megatron_mesh.evaluation.run
check_transformers()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr


def test_an_export_refuses_an_old_version(exported, old_transformers: None, tmp_path: Path) -> None:
    """Its configuration file, which transformers imports first, checks the version."""
    directory = shutil.copytree(exported()[1], tmp_path / "for-old-transformers")
    with pytest.raises(
        ImportError, match=r"found transformers==4\.49\.0\.\s.*pip install 'transformers>=4\.57'"
    ):
        get_class_from_dynamic_module("configuration_mesh.MeshConfig", str(directory))
