"""The eager loop does the same work as ``base``, and trains correctly."""

import importlib.util
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_mesh.config.sizes import forward_flops_per_token
from megatron_mesh.data import Batch
from tests.helpers import one_process
from tools.bench.measure import Variant
from tools.bench.settings import StepSettings
from tools.bench.variants import batches_of, build_variant, variant_config, why_skipped

S, B, H = 16, 2, 32
TOY = StepSettings(
    layers="1+2R3+1",
    hidden_size=H,
    num_attention_heads=2,
    vocab_size=128,
    seq_length=S,
    micro_batch_size=B,
    num_micro_batches=4,
    bf16=False,
)


def eager(settings: StepSettings = TOY) -> Variant:
    return build_variant("eager", variant_config(settings, "eager"), settings.eager_attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_parameters_and_flops_equal_those_of_base(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    torch.set_num_threads(1)
    config = variant_config(TOY, "base")
    with one_process(config):
        ours = build_variant("base", config)
    theirs = eager(replace(TOY, eager_attention=attention))
    counts = [sum(p.numel() for p in variant.model.parameters()) for variant in (ours, theirs)]
    assert counts[0] == counts[1]
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **keywords):
        calls.append(keywords)
        return fused(*args, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs.losses(batches_of(TOY)[0])
    depth, causal_half = 2 + 2 * 3, 2 * S * H  # the counter counts all scores
    # Some versions of transformers compute the rotary angles with a matrix product.
    angles = S * H // 2 // 4
    assert len(calls) == (depth if attention == "sdpa" else 0)
    assert all(c["is_causal"] and c["attn_mask"] is None for c in calls), (
        "otherwise a GPU would use a slower kernel"
    )
    expected = (forward_flops_per_token(config.model) + depth * causal_half) * S * B
    assert counter.get_total_flops() - expected in (0, angles)


def test_gradients_are_those_of_one_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    torch.set_num_threads(1)
    batches = batches_of(TOY)
    variant = eager()
    accumulated = []
    monkeypatch.setattr(
        variant.optimizer, "step", lambda: accumulated.extend(p.grad for p in variant.model.parameters())
    )
    variant.config.optimizer.clip_grad = math.inf
    variant.step(batches)
    variant.optimizer.zero_grad()
    variant.losses(
        Batch(*(torch.cat(column) for column in zip(*map(vars_of, batches), strict=True)))
    ).backward()
    for ours, whole in zip(accumulated, variant.model.parameters(), strict=True):
        torch.testing.assert_close(ours, whole.grad, rtol=1e-4, atol=1e-6)


def vars_of(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch.tokens, batch.labels, batch.loss_mask, batch.position_ids


@pytest.mark.parametrize(("bf16", "attention"), [(False, "eager"), (True, "sdpa")])
def test_it_learns_and_is_causal(bf16: bool, attention: str) -> None:
    pytest.importorskip("transformers")
    torch.set_num_threads(1)
    settings = replace(TOY, bf16=bf16, eager_attention=attention)
    variant, batches = eager(settings), batches_of(settings)
    first = variant.losses(batches[0]).item()
    for _ in range(8):
        variant.step(batches)
    assert variant.losses(batches[0]).item() < first - 0.1
    assert all(p.dtype == torch.float32 for p in variant.model.parameters())
    tokens = batches[0].tokens.clone()
    with torch.no_grad():
        before = variant.model(tokens)
        tokens[:, -1] = (tokens[:, -1] + 1) % 128
        after = variant.model(tokens)
    assert torch.equal(before[:, :-1], after[:, :-1]) and not torch.equal(before[:, -1], after[:, -1])


def test_it_is_skipped_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_skipped("mesh") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_skipped("mesh") is None
    for name in ("eager", "eager-compiled"):
        assert why_skipped(name) == "transformers is not installed (pip install -e '.[hf]')"
