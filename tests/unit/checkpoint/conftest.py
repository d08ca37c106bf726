"""A finished run with checkpoints. Tests damage copies of them."""

import shutil
from pathlib import Path

import pytest

from tests.unit.train.conftest import Outcome, corpus, run, tiny  # noqa: F401


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> dict[str, Path]:
    """Holds the directory of the finished run, once it was made."""
    return {}


@pytest.fixture
def checkpoints(tiny, finished, tmp_path_factory, tmp_path) -> Path:  # noqa: F811
    """A copy of a run's directory with the checkpoints of steps 2, 4 and 6."""
    if not finished:
        finished["here"] = tmp_path_factory.mktemp("finished") / "run"
        run(tiny(save=str(finished["here"]), save_interval=2))
    return Path(shutil.copytree(finished["here"], tmp_path / "copy"))


@pytest.fixture(scope="session")
def straight_runs() -> list[Outcome]:
    """Holds the run of ``straight``, once it was made."""
    return []


@pytest.fixture
def straight(tiny, straight_runs) -> Outcome:  # noqa: F811
    """An undisturbed run of 6 steps."""
    if not straight_runs:
        straight_runs.append(run(tiny()))
    return straight_runs[0]
