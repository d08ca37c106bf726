"""A wheel that is installed outside any clone can pretrain, plan, submit and convert."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_mesh.data.indexed import IndexedWriter

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("megatron_mesh", "tools", "examples", "pretrain_mesh.py", "setup.py", "pyproject.toml")
TEXTS = ("README.md", "LICENSE")
MODEL = ["--layers", "1+1R2+1", "--hidden-size", "32", "--num-attention-heads", "2", "--seq-length", "16"]
MODEL += ["--vocab-size", "128", "--global-batch-size", "2", "--micro-batch-size", "1", "--no-bf16"]

Run = Callable[..., str]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the installed wheel. It is built from a copy, so that the tree stays clean."""
    pytest.importorskip("setuptools", reason="setuptools, which builds the wheel, is not installed")
    top = tmp_path_factory.mktemp("wheel")
    for name in (*SOURCES, *TEXTS):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, top / "source" / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, top / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(top), str(top / "source")],
        check=True,
    )
    (wheel,) = top.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", str(top / "installed"), str(wheel)], check=True)
    shutil.rmtree(top / "source")
    return top / "installed"


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """Runs ``megatron-mesh`` of the wheel in an empty directory; returns what it prints."""

    def run(*arguments: object) -> str:
        environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, installed / "bin/megatron-mesh", *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_what_is_in_it(installed: Path, run: Run) -> None:
    commands = re.findall(r"^  ([a-z-]+)  ", run("--help"), re.M)
    assert {"pretrain", "plan", "submit", "convert-to-hf", "convert-from-hf"} <= set(commands)
    tools = {path.name for path in (installed / "megatron_mesh/tools").iterdir()} - {"__pycache__"}
    assert tools == {path.name for path in (ROOT / "tools").glob("*.py")}
    presets = {path.name for path in (installed / "megatron_mesh/presets").iterdir()}
    assert presets == {path.name for path in (ROOT / "examples/configs").glob("*.yaml")}
    assert (installed / "megatron_mesh/py.typed").is_file()


def test_pretrains_and_converts(run: Run, tmp_path: Path) -> None:
    with IndexedWriter(str(tmp_path / "text"), np.uint16) as writer:
        writer.add(np.arange(2000, dtype=np.uint16) % 128, np.full(40, 50))
        writer.commit()
    data = ["--data-path", "text", "--split", "1,0,0", "--num-workers", "0"]
    run("pretrain", *MODEL, *data, "--train-iters", 2, "--save", "run", "--lr-warmup-iters", 0)
    assert (tmp_path / "run/iter_0000002").is_dir()
    assert "wrote hf" in run("convert-to-hf", "--load", "run", "--save", "hf")
    assert (tmp_path / "hf/model.safetensors").is_file()


def test_plans_a_preset(run: Run) -> None:
    preset = min((ROOT / "examples/configs").glob("pythia-1.4b*.yaml")).stem
    assert "pipeline rank" in run("plan", "--config", preset)


def test_submits(run: Run, tmp_path: Path) -> None:
    text = (ROOT / "examples/slurm/site.sh").read_text(encoding="utf-8")
    (tmp_path / "site.sh").write_text(re.sub(r"(?m)^PYTHON=\S+", f"PYTHON={sys.executable}", text))
    settings = [*MODEL, "--global-batch-size", "16", "--data-path", "/data/text", "--save", tmp_path / "run"]
    settings += ["--train-iters", 10, "--lr-warmup-iters", 1]
    script = run("submit", "--site", "site.sh", *settings, "--save-interval", 5, "--dry-run")
    assert "#SBATCH --nodes=1\n" in script
