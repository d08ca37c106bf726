"""A finished run with checkpoints, to damage copies of."""

import shutil
from pathlib import Path

import pytest

from tests.unit.train.conftest import corpus, run, tiny  # noqa: F401


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
