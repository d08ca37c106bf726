"""Processes in which Triton interprets its kernels, or compiles them for a GPU that this machine lacks.

They are separate because Triton decides when it is imported whether it interprets kernels.
"""

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., Any]


@pytest.fixture(scope="package")
def interpreter() -> Iterator[Run]:
    """Call ``interpreter(function, *arguments)`` to run kernels on the CPU, program by program."""
    yield from _worker({"TRITON_INTERPRET": "1"})


@pytest.fixture(scope="package")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Call ``compiler(function, *arguments)`` to compile kernels for a GPU."""
    cache: Path = tmp_path_factory.mktemp("triton")
    yield from _worker({"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)})


def _worker(environment: dict[str, str]) -> Iterator[Run]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as pool:
            yield lambda function, *arguments: pool.submit(function, *arguments).result()
