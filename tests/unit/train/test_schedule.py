"""Learning rates against closed formulas, and the optimizer's parameter groups."""

import math

import pytest
import torch
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from megatron_mesh.parallel import build_stage
from megatron_mesh.train.optimizer import build_optimizer, build_schedule, warn_if_lr_reaches_zero_early
from tests.helpers import one_process

LR, MIN_LR, WARMUP, DECAY, LAST = 1e-2, 1e-3, 4, 20, 24


def expected(style: str, n: int, wsd: int, wsd_style: str) -> float:
    """Return the learning rate of step ``n + 1``."""
    if n <= WARMUP:
        return LR * n / WARMUP
    x = min(1.0, (n - WARMUP) / (DECAY - WARMUP))
    if style == "constant":
        return LR
    if style == "linear":
        return LR + (MIN_LR - LR) * x
    if style == "cosine":
        return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * x)) / 2
    y = min(1.0, max(0.0, (n - (DECAY - wsd)) / wsd))
    shape = {
        "linear": 1 - y,
        "cosine": (1 + math.cos(math.pi * y)) / 2,
        "exponential": 2 * 0.5**y - 1,
        "minus_sqrt": 1 - math.sqrt(y),
    }
    return MIN_LR + (LR - MIN_LR) * shape[wsd_style]


@pytest.mark.parametrize(
    ("style", "wsd_style"),
    [
        ("constant", "linear"),
        ("linear", "linear"),
        ("cosine", "linear"),
        ("WSD", "exponential"),
        ("WSD", "linear"),
        ("WSD", "cosine"),
        ("WSD", "minus_sqrt"),
    ],
)
def test_learning_rates(tiny, style, wsd_style):
    wsd = 6 if style == "WSD" else None
    config = tiny(
        lr=LR,
        min_lr=MIN_LR,
        lr_decay_style=style,
        lr_decay_iters=DECAY,
        lr_warmup_fraction=None,
        lr_warmup_iters=WARMUP,
        lr_wsd_decay_iters=wsd,
        lr_wsd_decay_style=wsd_style,
        train_iters=LAST,
    )
    with one_process(config):
        optimizer = build_optimizer(config, build_stage(config))
        schedule = build_schedule(config.optimizer, optimizer)
        rates = []
        for _ in range(LAST):
            rates.append(get_canonical_lr_for_logging(optimizer.param_groups))
            schedule.step(1)
    assert rates == pytest.approx([expected(style, n, wsd or 1, wsd_style) for n in range(LAST)])


def test_biases_and_norms_do_not_decay(tiny):
    config = tiny(weight_decay=0.3)
    with one_process(config):
        stage = build_stage(config)
        optimizer = build_optimizer(config, stage)
        build_schedule(config.optimizer, optimizer)
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in stage.modules[0].named_parameters():
            vector = name.endswith(".bias") or "layernorm" in name
            assert decay[id(parameter)] == (0.0 if vector else 0.3), name


def test_the_optimizer_itself_decays_weights(tiny):
    """The schedule sets the same decay anew in every step; without a schedule the optimizer's own counts."""
    config = tiny(weight_decay=0.3, lr=0.1)
    with one_process(config):
        stage = build_stage(config)
        optimizer = build_optimizer(config, stage)
        weight = stage.modules[0].decoder.core.layers[0].mlp.linear_fc1.weight
        before = weight.detach().clone()
        stage.zero_grad_buffer()
        optimizer.step()
        torch.testing.assert_close(weight, before * (1 - 0.1 * 0.3))


def test_warning_about_steps_after_the_decay(tiny, caplog):
    """A resolved config.yaml fixes the decay. If the run is made longer, it continues at a rate of 0."""
    longer = {"train_iters": 700, "lr_decay_iters": 600}
    warn_if_lr_reaches_zero_early(tiny(**longer))
    assert "the learning rate is 0 after step 600" in caplog.text
    caplog.clear()
    for settings in (
        {"train_iters": 700},
        {**longer, "min_lr": 1e-5},
        {**longer, "lr_decay_style": "constant"},
    ):
        warn_if_lr_reaches_zero_early(tiny(**settings))
    assert not caplog.text
