"""Runs engines of vLLM in a separate process, one after the other."""

import gc
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any

_START_SECONDS = 300
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # starts faster without a separate process for the scheduler
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Batch:
    """Prompts that are sent at the same time."""

    prompts: list[list[int]]
    sampling: dict[str, Any]
    """Arguments of vLLM's SamplingParams."""


@dataclass(frozen=True)
class Answer:
    """The engine's answer to one prompt."""

    samples: list[list[int]]
    logprobs: list[float] | None
    """Log-probabilities of the prompt's tokens except the first, if ``prompt_logprobs`` was requested."""
    cached: int
    """Number of prompt tokens whose keys and values came from the prefix cache."""


@dataclass(frozen=True)
class Job:
    """An engine, and the batches that it answers in this order."""

    model: Path
    batches: list[Batch]
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of vLLM's LLM."""


class Engines:
    """A process that runs jobs. vLLM changes classes of transformers, so it must not run in the test process.

    Args:
        environment: environment variables for vLLM, in addition to those in ``_ENVIRONMENT``.
    """

    def __init__(self, **environment: str) -> None:
        variables = {**_ENVIRONMENT, **environment}
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _prepare, (variables,))

    def run(self, job: Job) -> list[list[Answer]]:
        """Return the answers to every batch. Errors of vLLM are raised here."""
        return self._pool.submit(_run, job).result(_START_SECONDS)

    def __enter__(self) -> "Engines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


def _prepare(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def _run(job: Job) -> list[list[Answer]]:
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    options = {"dtype": "float32", "max_num_seqs": 8, "trust_remote_code": True, **job.options}
    llm = LLM(model=str(job.model), **options)
    try:
        return [_ask(llm, batch) for batch in job.batches]
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _ask(llm: Any, batch: Batch) -> list[Answer]:
    from vllm import SamplingParams, TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in batch.prompts]
    sampling = SamplingParams(detokenize=False, ignore_eos=True, **batch.sampling)
    return [_answer(output) for output in llm.generate(prompts, sampling, use_tqdm=False)]


def _answer(output: Any) -> Answer:
    logprobs = None
    if output.prompt_logprobs is not None:
        scored = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        logprobs = [found[token].logprob for token, found in scored]
    samples = [list(sample.token_ids) for sample in output.outputs]
    return Answer(samples, logprobs, output.num_cached_tokens or 0)
