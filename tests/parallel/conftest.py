"""Checkpoints saved by one process and what one process makes of them, once per kind of model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.pool import close_all, pool
from tests.parallel.training import Outcome, save_initial, train


@pytest.fixture(scope="package", autouse=True)
def pools() -> Iterator[None]:
    """The workers live as long as there are tests for them: idle ones take time too, since gloo polls."""
    yield
    close_all()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Outcome]]:
    """``reference(**model)``: a checkpoint of that model and the training of one process from it."""
    known: dict[str, tuple[Path, Outcome]] = {}

    def get(**model: Any) -> tuple[Path, Outcome]:
        key = str(sorted(model.items()))
        if key not in known:
            directory = tmp_path_factory.mktemp("initial") / "weights"
            pool(1).run(save_initial, directory, model)
            known[key] = directory, pool(1).run(train, directory, model)[0]
        return known[key]

    return get
