"""Loss and gradients of a batch compared with plain torch; accumulation; validation."""

import pytest
import torch
import torch.nn.functional as F

from megatron_mesh.data import Batch
from megatron_mesh.errors import UserError
from megatron_mesh.model import build_model
from megatron_mesh.parallel import plain_stage
from megatron_mesh.train.data import open_batches
from megatron_mesh.train.loop import build_run
from megatron_mesh.train.step import evaluate, run_batch
from tests.helpers import loss_per_token, one_process, randomise, relative_error
from tests.unit.train.conftest import run


def random_batch(sequences: int, seed: int) -> Batch:
    """Return ids below 128. A share of the positions is masked, which differs between seeds."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 128, (sequences, 17), generator=generator)
    mask = (torch.rand(sequences, 16, generator=generator) < 0.2 + 0.2 * seed).float()
    return Batch(ids[:, :-1], ids[:, 1:], mask, torch.arange(16).expand(sequences, 16))


def direct_loss(model: torch.nn.Module, batches: list[Batch]) -> torch.Tensor:
    """Return the masked mean of the cross entropy over all batches together, from the logits."""
    losses, masks = [], []
    for batch in batches:
        logits = model(batch.tokens, batch.position_ids, None)
        losses.append(F.cross_entropy(logits.float().transpose(1, 2), batch.labels, reduction="none"))
        masks.append(batch.loss_mask)
    return (torch.cat(losses) * torch.cat(masks)).sum() / torch.cat(masks).sum()


def test_loss_and_gradients_per_token(tiny):
    """Micro-batches have different numbers of unmasked tokens, so the mean of their means would be wrong."""
    config = tiny()
    batches = [random_batch(2, seed) for seed in range(4)]
    with one_process(config):
        model, plain = build_model(config), build_model(config)
        for each in (model, plain):
            randomise(each)
        totals = run_batch(plain_stage([model], config), iter(batches), config.training)
        loss = loss_per_token(totals)
        expected = direct_loss(plain, batches)
        expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for (name, parameter), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert relative_error(parameter.main_grad, reference.grad) < 1e-5, name


@pytest.mark.parametrize("recurrence", ["mesh", "vanilla"])
def test_accumulation_does_not_change_training(tiny, recurrence):
    layers = "4" if recurrence == "vanilla" else "1+1R2+1"
    whole, parts = (run(tiny(recurrence, layers, micro_batch_size=size, train_iters=4)) for size in (8, 2))
    assert parts.values("loss") == pytest.approx(whole.values("loss"), rel=1e-5)
    assert parts.values("grad_norm") == pytest.approx(whole.values("grad_norm"), rel=1e-4)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], weight, rtol=1e-3, atol=1e-5)


def test_clipping_limits_the_step_and_not_the_report(tiny):
    """One step of AdamW doesn't depend on the scale of its gradients, but its second moment does."""
    free, clipped = (run(tiny(clip_grad=clip, train_iters=1, lr_warmup_fraction=None)) for clip in (0.0, 0.1))
    norm = free.values("grad_norm")[0]
    assert clipped.values("grad_norm")[0] == norm > 0.1
    for a, b in zip(free.optimizer[1::4], clipped.optimizer[1::4], strict=True):
        torch.testing.assert_close(b, a * (0.1 / norm), rtol=1e-4, atol=1e-9)


def test_evaluation_is_the_mean_over_the_fixed_samples(tiny):
    config = tiny(eval_interval=1, eval_iters=2)
    with one_process(config) as health:
        parts = build_run(config)
        model = parts.stage.modules[0]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        loss = evaluate(parts.stage, config, parts.data.validation, health).losses[""]
        with torch.no_grad():
            expected = direct_loss(model, list(open_batches(config, parts.data.valid)))
        assert len(parts.data.valid) == 16
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert evaluate(parts.stage, config, parts.data.validation, health).losses == {"": loss}
        assert model.training
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_evaluation_does_not_change_training(tiny):
    without = run(tiny())
    outcome = run(tiny(eval_interval=2))
    assert outcome.values("loss") == without.values("loss")
    assert [r.step for r in outcome.records if r.kind == "valid"] == [2, 4, 6]
    assert [r.step for r in outcome.records if r.kind == "test"] == [6]


def test_training_learns(tiny):
    losses = run(tiny(train_iters=30)).values("loss")
    assert losses[0] == pytest.approx(4.85, abs=0.1)  # ln 128
    assert losses[-1] < 4.2


def test_bfloat16_follows_float32(tiny):
    full, half = (run(tiny(bf16=bf16)).values("loss") for bf16 in (False, True))
    assert half != full
    assert half == pytest.approx(full, rel=5e-3)


def test_ids_beyond_the_vocabulary(tiny):
    with pytest.raises(UserError, match=r"the data contain token \d+, .* 50 entries.*--tokenizer-model"):
        run(tiny(vocab_size=50, make_vocab_size_divisible_by=64))
