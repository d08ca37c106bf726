"""Every name of a run's files is spelled once in Python, and shell scripts agree with it."""

import ast
import re
from pathlib import Path

import megatron_mesh
from megatron_mesh.runtime import run_files

PACKAGE = Path(megatron_mesh.__file__).parent
ROOT = PACKAGE.parent
WORDS = {"stop", "slurm", "code", "cache"}
"""File names that are ordinary words, too, and may stand in other strings."""


def constants() -> dict[str, str]:
    return {name: value for name, value in vars(run_files).items() if name.isupper()}


def spelled(path: Path) -> set[str]:
    """The strings in a Python file, docstrings apart."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    }


def test_names_are_spelled_in_one_module() -> None:
    names = set(constants().values()) - WORDS
    sources = [*PACKAGE.rglob("*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("examples/**/*.py")]
    repeated = {
        path.relative_to(ROOT).as_posix(): found
        for path in [*sources, ROOT / "pretrain_mesh.py"]
        if path != Path(run_files.__file__) and (found := spelled(path) & names)
    }
    assert repeated == {}


def test_job_script_uses_the_same_names() -> None:
    (script,) = [*ROOT.glob("examples/slurm/job.sh"), *PACKAGE.glob("slurm/**/job.sh")]
    text = script.read_text(encoding="utf-8")
    in_run = set(re.findall(r"\$RUN/([\w./]+)", text))
    starts = f"{run_files.SLURM_FOLDER}/{run_files.STARTS_FILE}"
    files = {run_files.OWNER_FILE, run_files.STATUS_FILE, run_files.STOP_FILE, run_files.SLURM_FOLDER, starts}
    assert in_run == files
    assert f"grep -xE '{run_files.CHECKPOINT_PREFIX}[0-9]+'" in text


def test_checkpoint_names(tmp_path: Path) -> None:
    path = run_files.checkpoint_path(tmp_path, 20)
    assert path == tmp_path / "iter_0000020"
    assert run_files.checkpoint_step(path.name) == 20
    assert run_files.checkpoint_step(f"{path.name}.partial") is None
    assert run_files.checkpoint_path(tmp_path, 12_345_678).name == "iter_12345678"


def test_earlier_versions_come_in_order(tmp_path: Path) -> None:
    path = tmp_path / run_files.METRICS_FILE
    earlier = [run_files.numbered(path, number) for number in (1, 2, 10)]
    for file in (path, *earlier):
        file.touch()
    assert earlier[0].name == "metrics.1.jsonl"
    assert run_files.earlier_versions(path) == earlier
