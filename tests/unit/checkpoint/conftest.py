"""A finished run with checkpoints, to damage copies of."""

import shutil
from pathlib import Path

import pytest

from tests.unit.train.conftest import Outcome, corpus, run, tiny  # noqa: F401


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> dict[str, Path]:
    """Where the finished run's checkpoints are, once there are any."""
    return {}


@pytest.fixture
def checkpoints(tiny, finished, tmp_path_factory, tmp_path) -> Path:  # noqa: F811
    """A copy of a directory with the checkpoints of steps 2, 4 and 6."""
    if not finished:
        finished["here"] = tmp_path_factory.mktemp("finished") / "run"
        run(tiny(save=str(finished["here"]), save_interval=2))
    return Path(shutil.copytree(finished["here"], tmp_path / "copy"))


@pytest.fixture(scope="session")
def straight_runs() -> list[Outcome]:
    """The run below, once there is one."""
    return []


@pytest.fixture
def straight(tiny, straight_runs) -> Outcome:  # noqa: F811
    """A run of 6 steps that nothing disturbs."""
    if not straight_runs:
        straight_runs.append(run(tiny()))
    return straight_runs[0]
