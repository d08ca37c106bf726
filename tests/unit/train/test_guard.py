"""Steps whose loss or gradients are not finite are skipped; many in a row end the run."""

import math
import time

import pytest
import torch

from megatron_mesh.checkpoint import writer
from megatron_mesh.metrics.console import numbers
from megatron_mesh.runtime import exits
from megatron_mesh.train import step
from tests.unit.train.conftest import run


@pytest.fixture
def poisoned(monkeypatch):
    """``poisoned(steps)``: the gradients of these steps (from 1) become NaN, or their loss infinite."""

    def poison(nan_gradients: set[int], infinite_loss: frozenset[int] = frozenset()) -> None:
        count = 0
        original = step.run_batch

        def run_batch(stage, batches, training, **more):
            nonlocal count
            count += 1
            totals = original(stage, batches, training, **more)
            if count in nan_gradients:
                next(iter(stage.modules[0].parameters())).main_grad[0] = math.nan
            return totals * math.inf if count in infinite_loss else totals

        monkeypatch.setattr(step, "run_batch", run_batch)

    return poison


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_bad_step_does_not_change_the_weights(tiny, poisoned, bf16):
    settings = {"bf16": bf16, "lr": 1e-2, "lr_decay_style": "constant", "lr_warmup_fraction": None}
    two = run(tiny(train_iters=2, **settings))
    poisoned({3})
    outcome = run(tiny(train_iters=3, **settings))
    assert outcome.ending == exits.DONE
    for name, weight in two.weights.items():
        assert torch.equal(weight, outcome.weights[name]), name
    (skipped,) = [r for r in outcome.records if r.kind == "skipped"]
    assert skipped.step == 3 and math.isnan(skipped.values["grad_norm"])
    assert (skipped.values["first_sample"], skipped.values["last_sample"]) == (16, 23)
    assert skipped.values["sources"].startswith("8 of ") and "(epoch 1)" in numbers(skipped)
    assert math.isfinite(skipped.values["loss"])
    assert [r.step for r in outcome.records if r.kind == "train"] == [1, 2]


def test_an_infinite_loss_is_skipped_too(tiny, poisoned):
    poisoned(set(), frozenset({2}))
    outcome = run(tiny(train_iters=4))
    assert [r.step for r in outcome.records if r.kind == "train"] == [1, 3, 4]
    assert all(torch.isfinite(weight).all() for weight in outcome.weights.values())


def test_a_good_step_resets_the_count(tiny, poisoned):
    poisoned({2, 3, 5, 6})
    assert run(tiny(train_iters=8, max_skipped_steps=3)).ending == exits.DONE


def test_a_pending_checkpoint_is_the_last_good_one(tiny, poisoned, tmp_path, monkeypatch, caplog):
    original = writer.write_file

    def slow(*arguments):
        time.sleep(1.0)
        return original(*arguments)

    monkeypatch.setattr(writer, "write_file", slow)
    poisoned({3, 4})
    config = tiny(max_skipped_steps=2, save=str(tmp_path), save_interval=2, async_save=True)
    assert run(config).ending == exits.DIVERGED
    assert f"the last good checkpoint: {tmp_path}/iter_0000002" in caplog.text


def test_many_in_a_row_end_the_run_and_name_the_last_good_checkpoint(tiny, poisoned, tmp_path, caplog):
    poisoned({4, 5, 6, 7, 8, 9})
    config = tiny(train_iters=20, max_skipped_steps=4, save=str(tmp_path), save_interval=2)
    outcome = run(config)
    assert outcome.ending == exits.DIVERGED
    assert [r.step for r in outcome.records if r.kind == "skipped"] == [4, 5, 6, 7]
    assert f"the last good checkpoint: {tmp_path}/iter_0000002" in caplog.text
