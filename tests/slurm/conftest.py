"""One cluster and one undisturbed run for all of these tests."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.runs import Job, submit, write_settings


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of two idle nodes."""
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
    """The configuration file of a tiny model."""
    return write_settings(tmp_path_factory.mktemp("settings"))


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run that trains to the end without interruption."""
    job = submit(cluster, settings, tmp_path_factory.mktemp("undisturbed") / "run")
    assert job.wait_for_end() == "COMPLETED", job.log
    assert job.fields["Restarts"] == "0" and job.status() == "done"
    return job


@pytest.fixture
def start(cluster: Cluster, settings: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Submits a run like ``runs.submit``. At the end of the test all jobs are killed."""
    numbers = itertools.count()
    yield lambda *flags, **options: submit(
        cluster, settings, tmp_path / f"run{next(numbers)}", *flags, **options
    )
    cluster.clear()
