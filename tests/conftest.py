"""Fixtures that every test may use."""

import os
import tempfile
from pathlib import Path

import hypothesis
import pytest

# Where transformers copies the code of models that it runs, by the name of their directory. Each process has
# its own place, or else tests that run side by side would use each other's code.
_code = tempfile.TemporaryDirectory(prefix="transformers-code-")
os.environ["HF_MODULES_CACHE"] = _code.name


hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real text, tokenizer and evaluation sets that lie beside a developer's checkout."""
    path = Path(__file__).resolve().parents[1].parent / "shared"
    if not (path / "data").is_dir():
        pytest.skip("the shared data (../shared/data) is not on this machine")
    return path


@pytest.hookimpl(tryfirst=True)  # before xdist, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For ``--dist loadgroup``: a file stays in one worker, as does a folder of tests with many processes."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        item.add_marker(pytest.mark.xdist_group(str(item.path) if folder == "unit" else folder))
