"""The suite catches planted faults: each is applied to a copy of the tree, where its test must fail."""

import ast
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.planted.faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_mesh"
COPIED = (
    *("megatron_mesh", "tests", "tools", "examples", ".ci"),
    *("pretrain_mesh.py", "setup.py", "pyproject.toml", "MANIFEST.in", "Makefile"),
    *("README.md", "CONTRIBUTING.md", "LICENSE"),
)
SECONDS = 60
"""How long the test of a fault may take on a machine that does nothing else."""


@pytest.fixture(scope="session")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, which the faults damage one at a time."""
    directory = tmp_path_factory.mktemp("planted")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, directory / name)
    return directory


def run(copy: Path, test: str) -> tuple[int, str]:
    """Run a test of the copy; return pytest's exit status and its output, whose last line is the summary."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    # Without .pyc files: an old one would be used for a file that changes twice within a second.
    environment |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    limit = SECONDS * max(1, os.getloadavg()[0] / (os.cpu_count() or 1))
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-q", "--tb=short", test],
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        pytest.fail(f"{test} takes longer than {limit:.0f} s")
    return process.returncode, output.strip()


@functools.cache
def passes(copy: Path, test: str) -> bool:
    """Whether a test passes in the undamaged copy, in full: a test that is skipped catches nothing."""
    status, output = run(copy, test)
    summary = output.splitlines()[-1]
    assert status == 0 and " passed" in summary and "skipped" not in summary, output
    return True


@contextmanager
def planted(copy: Path, fault: Fault) -> Iterator[None]:
    """Damage the copy inside."""
    path = copy / "megatron_mesh" / fault.file
    original = path.read_text(encoding="utf-8")
    path.write_text(damaged(original, fault), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(original, encoding="utf-8")


def damaged(text: str, fault: Fault) -> str:
    assert text.count(fault.before) == 1, f"{fault.name}: {fault.file} has {fault.before!r} not exactly once"
    return text.replace(fault.before, fault.after)


ALL = bool(os.environ.get("MESH_TEST_PLANTED"))
CASES = [
    pytest.param(
        fault,
        id=fault.name,
        marks=[
            pytest.mark.xdist_group(fault.test.partition("[")[0]),  # so that its undamaged run is made once
            *([] if fault.quick or ALL else [pytest.mark.skip("make test-planted plants it")]),
        ],
    )
    for fault in FAULTS
]


@pytest.mark.parametrize("fault", CASES)
def test_a_planted_fault_is_caught(fault: Fault, copy: Path) -> None:
    assert passes(copy, fault.test)
    with planted(copy, fault):
        status, output = run(copy, fault.test)
    summary = output.splitlines()[-1]
    assert status == 1 and re.search(r"\d+ failed", summary), output
    # Otherwise the planted line is at fault, and not the code that it damages.
    assert not re.search(r"\b(NameError|SyntaxError|ImportError)\b", output), output


def test_the_table_covers_every_folder() -> None:
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/__init__.py")}
    assert {fault.file.split("/")[0] for fault in FAULTS} == folders
    assert len(FAULTS) == 40 and len({fault.name for fault in FAULTS}) == 40


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_entry_is_up_to_date(fault: Fault) -> None:
    """The line is there once, the damaged file is still Python, and the test exists."""
    ast.parse(damaged((PACKAGE / fault.file).read_text(encoding="utf-8"), fault))
    path, _, function = fault.test.partition("[")[0].partition("::")
    assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8")
