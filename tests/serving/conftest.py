"""Exports, and the process that serves them. Everything is skipped where vLLM is not installed."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

from tests.serving.engine import Engines
from tests.serving.models import write_checkpoint, write_export, write_tokenizer
from tests.unit.evaluation.conftest import local_data  # noqa: F401 a fixture


@pytest.fixture(scope="session", autouse=True)
def needs_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed in this environment; make test-vllm makes one that has it")


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind(needs_vllm: None) -> Iterator[None]:
    """Shared memory of engines is gone when they are."""
    before = _unused_shared_memory()
    yield
    assert _unused_shared_memory() <= before


def _unused_shared_memory() -> set[str]:
    """vLLM's shared memory that no process has mapped; others on this machine may serve models too."""
    mapped = ""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            mapped += (process / "maps").read_text()
    files = [path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(("psm_", "vllm"))]
    return {name for name in files if name not in mapped}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of a scheme, written when it is first asked for."""
    tokenizer = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tokenizer(tokenizer)
    return cache(lambda scheme: write_checkpoint(tmp_path_factory.mktemp("run"), scheme, tokenizer))


@pytest.fixture(scope="session")
def export(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The export of a scheme's checkpoint, in a directory with the scheme's name."""
    # transformers keeps one class for directories of one name.
    return cache(lambda scheme: write_export(checkpoint(scheme), tmp_path_factory.mktemp("hf") / scheme))


@pytest.fixture(scope="session")
def engines(needs_vllm: None) -> Iterator[Engines]:
    with Engines() as running:
        yield running
