"""Fixtures: worker pools, and for each kind of model a training in one process to compare with."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.pool import close_all, pool
from tests.parallel.training import Outcome, save_initial, train


@pytest.fixture(scope="package", autouse=True)
def pools() -> Iterator[None]:
    """End the workers after the last test. Even idle ones take CPU time, because gloo polls."""
    yield
    close_all()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Outcome]]:
    """Call ``reference(**model)`` for a checkpoint of the model, and the results of training one process."""
    known: dict[str, tuple[Path, Outcome]] = {}

    def get(**model: Any) -> tuple[Path, Outcome]:
        key = str(sorted(model.items()))
        if key not in known:
            directory = tmp_path_factory.mktemp("initial") / "weights"
            pool(1).run(save_initial, directory, model)
            known[key] = directory, pool(1).run(train, directory, model)[0]
        return known[key]

    return get
