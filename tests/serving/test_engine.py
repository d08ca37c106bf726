"""vLLM's Transformers backend, without a plugin, gives the same output as transformers."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.engine import Answer, Batch, Engines, Job
from tests.serving.models import LENGTH, VOCABULARY, Expected, by_transformers, vocabulary_of

SCHEMES = ["mesh", "base", "anchor", "vanilla"]
MESH_SHORT = pytest.param("mesh", marks=pytest.mark.short)
NEW_TOKENS = 16
GREEDY = {"temperature": 0, "max_tokens": NEW_TOKENS}


def prompts() -> list[list[int]]:
    """Return prompts of 1 to 200 tokens. Three share their first 64 tokens, two blocks of the cache."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=generator).tolist()

    shared = draw(64)
    return [*(draw(n) for n in (1, 5, 33, 200)), *(shared + draw(n) for n in (1, 17, 100))]


@pytest.fixture(scope="module")
def expected(export: Callable[[str], Path]) -> Callable[[str], list[Expected]]:
    """Greedy tokens and log-probabilities by scheme."""
    return cache(lambda scheme: by_transformers(export(scheme), prompts(), NEW_TOKENS))


def check(answers: list[Answer], expected: list[Expected]) -> None:
    assert [answer.samples for answer in answers] == [[one.tokens] for one in expected]
    for answer, one in zip(answers, expected, strict=True):
        if answer.logprobs is not None:
            assert answer.logprobs == pytest.approx(one.logprobs, abs=1e-3)


WAYS: dict[str, dict[str, Any]] = {
    "chunks of 8": {"max_num_batched_tokens": 8, "enable_prefix_caching": False},
    "chunks of 40, prefixes cached": {"max_num_batched_tokens": 40, "block_size": 32},
    "whole prompts, prefixes cached": {"max_num_batched_tokens": 2048, "block_size": 32},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", [MESH_SHORT, *SCHEMES[1:]])
def test_without_compilation(
    engines: Engines,
    export: Callable[[str], Path],
    expected: Callable[[str], list[Expected]],
    scheme: str,
    way: str,
) -> None:
    """The second batch finds prefixes in the cache. For log-probabilities, vLLM recomputes prompts."""
    batches = [Batch(prompts(), {**GREEDY, "prompt_logprobs": 0}), Batch(prompts(), GREEDY)]
    job = Job(export(scheme), batches, {"enforce_eager": True, **WAYS[way]})
    scored, again = engines.run(job)
    check(scored, expected(scheme))
    check(again, expected(scheme))
    assert all(answer.logprobs is not None for answer in scored)
    hits = [answer.cached for answer in again]
    assert hits == [0] * len(hits) if "cached" not in way else min(hits[4:]) >= 64


@pytest.mark.parametrize("scheme", [MESH_SHORT, *SCHEMES[1:], "vanilla+mesh"])
def test_compiled(
    engines: Engines, export: Callable[[str], Path], expected: Callable[[str], list[Expected]], scheme: str
) -> None:
    """The default of vLLM, which is torch.compile, on a CPU with inductor."""
    batches = [Batch(prompts(), {**GREEDY, "prompt_logprobs": 0}), Batch(prompts(), GREEDY)]
    for answers in engines.run(Job(export(scheme), batches)):
        check(answers, expected(scheme))


@pytest.mark.parametrize("scheme", ["mesh", "vanilla"])
def test_padded_ids_are_never_sampled(engines: Engines, export: Callable[[str], Path], scheme: str) -> None:
    """The checkpoint's vocabulary is padded to 640. At a temperature of 2, padded ids would occur.

    The padding token, 600, has a row and may occur, since vLLM doesn't read ``suppress_tokens`` from
    generation_config.json. The tokenizer knows this token and decodes it to an empty text.
    """
    sampling = {"temperature": 2.0, "n": 64, "max_tokens": 64, "seed": 0}
    job = Job(export(scheme), [Batch(prompts()[:2], sampling)], {"enforce_eager": True, "max_num_seqs": 64})
    drawn = [i for answer in engines.run(job)[0] for sample in answer.samples for i in sample]
    assert len(drawn) == 2 * 64 * 64
    assert len(set(drawn)) > VOCABULARY // 2, "the temperature is too low for this test"
    assert max(drawn) < vocabulary_of(export(scheme)) <= VOCABULARY + 1


def test_every_token_depends_on_the_first(export: Callable[[str], Path]) -> None:
    """Otherwise the tests above would not notice a lost cache."""
    prompt = prompts()[3]
    assert len(prompt) + NEW_TOKENS <= LENGTH
    for scheme in SCHEMES:
        one, other = by_transformers(export(scheme), [prompt, [prompt[0] + 1, *prompt[1:]]], NEW_TOKENS)
        assert abs(one.logprobs[-1] - other.logprobs[-1]) > 1e-2
