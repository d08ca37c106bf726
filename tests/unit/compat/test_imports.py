"""GPU libraries that are installed but unusable count as missing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
GPU, NO_GPU = (
    f"import torch; torch.cuda.is_available = torch.accelerator.is_available = lambda: {there}; "
    "from megatron_mesh import compat; compat.install(); "
    for there in (True, False)
)


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = {"PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=path, cwd=ROOT, capture_output=True, text=True, timeout=600)


def plant(folder: Path, name: str, line: str) -> None:
    (folder / "transformer_engine").mkdir(exist_ok=True)
    (folder / "transformer_engine" / name).write_text(line + "\n")


@pytest.mark.parametrize("where", ["__init__.py", "pytorch.py"])
def test_every_way_to_break_is_a_missing_module(tmp_path: Path, where: str) -> None:
    """Each in a folder of its own, which comes first in sys.path during the import."""
    errors = ["ImportError", "OSError", "RuntimeError", "AssertionError"]
    for error in errors:
        (tmp_path / error).mkdir()
        plant(tmp_path / error, "__init__.py", "")
        plant(tmp_path / error, where, f"raise {error}('libcudart.so.13: cannot open {error}')")
    script = f"""{GPU}
import sys
for error in {errors}:
    sys.path.insert(0, f"{tmp_path}/{{error}}")
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        del sys.modules[name]
    try:
        import transformer_engine.pytorch
    except Exception as raised:
        print(f"{{type(raised).__name__}}: {{raised}}")
"""
    done = python(script, tmp_path)
    expected = [f"ModuleNotFoundError: libcudart.so.13: cannot open {error}" for error in errors]
    assert done.stdout.splitlines() == expected, done.stderr


def test_other_errors_keep_their_traceback_and_a_working_library_is_imported(tmp_path: Path) -> None:
    plant(tmp_path, "__init__.py", "raise TypeError('ours')")
    assert "\nTypeError: ours" in python(f"{GPU}import transformer_engine", tmp_path).stderr
    plant(tmp_path, "__init__.py", "number = 3")
    code = f"{GPU}import transformer_engine as te; print(te.number, te.__name__)"
    done = python(code, tmp_path)
    assert done.stdout == "3 transformer_engine\n"


WHY = (
    "from megatron_mesh.model.implementation import why_no_transformer_engine as why;"
    "from megatron.core.extensions.transformer_engine import HAVE_TE; print(HAVE_TE, why())"
)


def test_megatron_core_works_without_it(tmp_path: Path) -> None:
    plant(tmp_path, "__init__.py", "raise OSError('libcudart.so.13: cannot open')")
    done = python(GPU + WHY, tmp_path)
    assert done.stdout == (
        "False Transformer Engine is installed but cannot be imported (libcudart.so.13: cannot open)\n"
    ), done.stderr


def test_without_a_gpu_none_is_imported(tmp_path: Path) -> None:
    """The import would succeed, and Megatron-core's optimizer would fail in the first kernel."""
    for name in ("__init__.py", "pytorch.py"):
        plant(tmp_path, name, "print('loaded')")
    for name in ("apex.py", "amp_C.py"):
        (tmp_path / name).write_text("print('loaded')\n")
    adam = "; from megatron.core.optimizer import Adam; print(Adam.__module__)"
    done = python(NO_GPU + WHY + adam, tmp_path)
    assert done.stdout == "False there is no GPU\ntorch.optim.adamw\n", done.stderr
    for name in ("transformer_engine.pytorch", "apex", "amp_C"):
        error = python(f"{NO_GPU}import {name}", tmp_path).stderr
        assert "ModuleNotFoundError: there is no GPU" in error
