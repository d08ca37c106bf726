"""Exports to serve, and the process that serves them. All tests are skipped if vLLM is not installed."""

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
        pytest.skip("vLLM is not installed in this environment; make test-vllm creates one with it")


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind(needs_vllm: None) -> Iterator[None]:
    """Check that engines leave no shared memory behind."""
    before = _unused_shared_memory()
    yield
    assert _unused_shared_memory() <= before


def _unused_shared_memory() -> set[str]:
    """List shared memory of vLLM that no process maps. Mapped files may belong to other engines."""
    mapped = ""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended or belongs to another user
            mapped += (process / "maps").read_text()
    files = [path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(("psm_", "vllm"))]
    return {name for name in files if name not in mapped}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the checkpoint of a scheme, which is written at the first call."""
    tokenizer = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tokenizer(tokenizer)
    return cache(lambda scheme: write_checkpoint(tmp_path_factory.mktemp("run"), scheme, tokenizer))


@pytest.fixture(scope="session")
def export(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return the export of a scheme's checkpoint, in a directory named after the scheme."""
    # transformers uses one class for all directories with the same name.
    return cache(lambda scheme: write_export(checkpoint(scheme), tmp_path_factory.mktemp("hf") / scheme))


@pytest.fixture(scope="session")
def engines(needs_vllm: None) -> Iterator[Engines]:
    with Engines() as running:
        yield running
