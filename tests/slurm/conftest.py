"""One cluster for all of these tests, and a run that nothing disturbs."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.runs import Job, submit, write_settings


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, idle."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration file of a tiny model."""
    return write_settings(tmp_path_factory.mktemp("settings"))


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run that goes through at one stroke."""
    job = submit(cluster, settings, tmp_path_factory.mktemp("undisturbed") / "run")
    assert job.wait_for_end() == "COMPLETED", job.log
    assert job.fields["Restarts"] == "0" and job.status() == "done"
    return job


@pytest.fixture
def start(cluster: Cluster, settings: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Submits a run like ``runs.submit``; at the end of the test nothing of it is left."""
    numbers = itertools.count()
    yield lambda *flags, **options: submit(
        cluster, settings, tmp_path / f"run{next(numbers)}", *flags, **options
    )
    cluster.clear()
