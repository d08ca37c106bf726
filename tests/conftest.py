"""Fixtures that every test may use."""

import os
import tempfile
from pathlib import Path

import hypothesis
import pytest

from megatron_mesh import compat

compat.install()  # before any test imports Megatron-core, as in pretrain_mesh.py

# Where transformers copies the code of models that it runs, named after their directories. Each process has a
# cache of its own: otherwise tests that run at the same time would use each other's code.
_code = tempfile.TemporaryDirectory(prefix="transformers-code-")
os.environ["HF_MODULES_CACHE"] = _code.name


hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real text, a tokenizer and evaluation sets, from a directory next to a developer's checkout."""
    path = Path(__file__).resolve().parents[1].parent / "shared"
    if not (path / "data").is_dir():
        pytest.skip("the shared data (../shared/data) is not on this machine")
    return path


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For ``--dist loadgroup``: keep the unit tests of a file in one worker, and each other folder in one.

    Planted faults have groups of their own.
    """
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder != "planted":
            item.add_marker(pytest.mark.xdist_group(str(item.path) if folder == "unit" else folder))
