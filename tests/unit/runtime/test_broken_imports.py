"""A Transformer Engine that is installed and cannot be loaded counts as a missing one."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = {"PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=path, cwd=ROOT, capture_output=True, text=True, timeout=600)


def plant(folder: Path, name: str, line: str) -> None:
    (folder / "transformer_engine").mkdir(exist_ok=True)
    (folder / "transformer_engine" / name).write_text(line + "\n")


@pytest.mark.parametrize("where", ["__init__.py", "pytorch.py"])
@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError", "AssertionError"])
def test_every_way_to_break_is_a_missing_module(tmp_path: Path, error: str, where: str) -> None:
    plant(tmp_path, "__init__.py", "")
    plant(tmp_path, where, f"raise {error}('libcudart.so.13: cannot open')")
    done = python("import megatron_mesh, transformer_engine.pytorch", tmp_path)
    assert "ModuleNotFoundError: libcudart.so.13: cannot open" in done.stderr


def test_other_mistakes_keep_their_traceback_and_a_whole_one_is_imported(tmp_path: Path) -> None:
    plant(tmp_path, "__init__.py", "raise TypeError('ours')")
    assert "\nTypeError: ours" in python("import megatron_mesh, transformer_engine", tmp_path).stderr
    plant(tmp_path, "__init__.py", "number = 3")
    done = python("import megatron_mesh, transformer_engine as te; print(te.number, te.__name__)", tmp_path)
    assert done.stdout == "3 transformer_engine\n"


def test_megatron_core_works_without_it(tmp_path: Path) -> None:
    plant(tmp_path, "__init__.py", "raise OSError('libcudart.so.13: cannot open')")
    code = (
        "from megatron_mesh.model.implementation import why_no_transformer_engine as why;"
        "from megatron.core.extensions.transformer_engine import HAVE_TE; print(HAVE_TE, why())"
    )
    done = python(code, tmp_path)
    assert done.stdout == (
        "False Transformer Engine is installed and cannot be imported (libcudart.so.13: cannot open)\n"
    ), done.stderr
