"""Set up a world of one process, in which the tests build real models."""

from collections.abc import Iterator

import pytest

from tests.helpers import one_process, tiny_config


@pytest.fixture(scope="module")
def groups() -> Iterator[None]:
    with one_process(tiny_config()):
        yield
