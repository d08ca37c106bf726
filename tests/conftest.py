"""Fixtures that every test may use."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real text, tokenizer and evaluation sets that lie beside a developer's checkout."""
    path = Path(__file__).resolve().parents[1].parent / "shared"
    if not (path / "data").is_dir():
        pytest.skip("the shared data (../shared/data) is not on this machine")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For ``--dist loadgroup``: a file stays in one worker, and jobs of several processes take turns.

    Two jobs at once on the two cores of a small machine wait for each other in every collective.
    """
    jobs = ("parallel", "slurm", "end_to_end")
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        item.add_marker(pytest.mark.xdist_group("jobs" if folder in jobs else str(item.path)))
