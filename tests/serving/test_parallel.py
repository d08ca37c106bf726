"""vLLM with two processes: tensor parallelism works, pipeline parallelism is rejected."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serving.engine import Batch, Engines, Job
from tests.serving.models import by_transformers
from tests.serving.test_engine import GREEDY, NEW_TOKENS, check, prompts


def one_core_each() -> dict[str, str]:
    """Return the environment for an engine of two processes. By default, vLLM gives each a NUMA node."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    return {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[1]}"}


@pytest.mark.parametrize("scheme", ["mesh", "vanilla"])
def test_tensor_parallel(export: Callable[[str], Path], scheme: str) -> None:
    batches = [Batch(prompts(), {**GREEDY, "prompt_logprobs": 0})]
    job = Job(export(scheme), batches, {"enforce_eager": True, "tensor_parallel_size": 2})
    with Engines(**one_core_each()) as engines:
        answers = engines.run(job)[0]
    check(answers, by_transformers(export(scheme), prompts(), NEW_TOKENS))


def test_pipeline_parallel_is_refused(
    export: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """A loop cannot be divided into stages that a token passes through once."""
    job = Job(export("mesh"), [], {"enforce_eager": True, "pipeline_parallel_size": 2})
    with pytest.raises(Exception, match="initialization failed"), Engines(**one_core_each()) as engines:
        engines.run(job)
    assert "multiple `ModuleList`s in the base model are not supported" in "".join(capfd.readouterr())
