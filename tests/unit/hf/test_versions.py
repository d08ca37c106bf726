"""The list of tested transformers versions: setup.py allows them, CI runs them, exports warn about others."""

import logging
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.version import Version

from megatron_mesh.hf.modeling.versions import TESTED, minor, warn_if_untested

ROOT = Path(__file__).resolve().parents[3]
ENGINES = "5.19.0"  # SGLang pins it, vLLM allows it


def test_the_list() -> None:
    versions = [Version(text) for text in TESTED]
    assert versions == sorted(set(versions)) and not any(version.is_prerelease for version in versions)
    assert len({minor(text) for text in TESTED}) == len(TESTED), "one patch release of each minor release"


@pytest.fixture(scope="module")
def extras() -> dict[str, list[Requirement]]:
    with pytest.MonkeyPatch.context() as patch:
        given: dict = {}
        patch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        runpy.run_path(str(ROOT / "setup.py"))
    return {extra: list(map(Requirement, texts)) for extra, texts in given["extras_require"].items()}


@pytest.mark.parametrize("extra", ["hf", "eval"])
def test_setup_allows_what_is_tested(extras, extra) -> None:
    (allowed,) = [one.specifier for one in extras[extra] if one.name == "transformers"]
    assert all(version in allowed for version in (*TESTED, "5.19.2", "5.24.9"))
    for version in (
        "4.56.2",
        "4.57.5",
        "5.0.0",
        "5.16.0",
        "5.18.1",
        "5.20.0",
        "5.25.0.dev0",
        "5.25.0",
        "6.0.0",
    ):
        assert not allowed.contains(version, prereleases=True), version


def test_the_main_environment_has_the_newest() -> None:
    assert f"\ntransformers=={TESTED[-1]}\n" in (ROOT / ".ci/constraints.txt").read_text()


def test_ci_runs_oldest_engines_and_newest() -> None:
    """The main environment has the newest version, but not the packages for fine-tuning."""
    script = (ROOT / ".ci/run").read_text()
    loop = re.search(r"for version in (.+); do\n\s+make test-hf ", script)
    assert loop and loop[1].split() == [TESTED[0], ENGINES] and ENGINES in TESTED
    assert f'\nmake test-hf VERSION={TESTED[-1]} PYTEST_ARGS="-q -k finetune"\n' in script


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """The messages that transformers logs for our models."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.megatron_mesh")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.WARNING)  # other tests may have changed transformers' verbosity
    yield texts
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.mark.parametrize("version", [*TESTED, "4.57.7", "5.0.0", "5.17.2", "5.24.0.dev0", "5.24.1"])
def test_no_warning(warnings: list[str], version: str) -> None:
    warn_if_untested(version)
    assert warnings == []


@pytest.mark.parametrize("version", ["5.25.0.dev0", "5.25.0rc1", "5.25.1", "5.100.0", "6.0.0"])
def test_a_newer_version(warnings: list[str], version: str) -> None:
    for _ in range(2):
        warn_if_untested(version)
    (text,) = warnings
    assert f"transformers {version} is newer than" in text and ", ".join(TESTED) in text
    assert "convert_to_hf.py --refresh-code DIR" in text and f"pip install transformers=={TESTED[-1]}" in text


def test_an_older_patch_release(warnings: list[str]) -> None:
    warn_if_untested("4.57.1")
    (text,) = warnings
    assert "transformers 4.57.1 is older than" in text and f"pip install transformers=={TESTED[0]}" in text


@pytest.mark.versions
def test_exports_warn_once_per_process(exported, tmp_path: Path) -> None:
    """Although transformers imports the code of each directory separately."""
    for name in ("first", "second", "third"):
        shutil.copytree(exported()[1], tmp_path / name)
    code = """
import importlib.metadata, sys
from transformers import AutoConfig
AutoConfig.from_pretrained("first", trust_remote_code=True)
print("now a newer version", file=sys.stderr)
real = importlib.metadata.version
importlib.metadata.version = lambda name: "99.1.0" if name == "transformers" else real(name)
for name in ("second", "third"):
    config = AutoConfig.from_pretrained(name, trust_remote_code=True)
assert "megatron_mesh" not in sys.modules
print(config.transformers_tested)
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert ended.returncode == 0, ended.stderr
    before, after = ended.stderr.split("now a newer version")
    assert "is newer than" not in before
    assert after.count("transformers 99.1.0 is newer than") == 1
    assert ended.stdout.strip() == str(list(TESTED))
