"""Saving and resuming: a resumed run equals one that never stopped, bit for bit."""

import json
import random

import numpy as np
import pytest
import torch

from megatron_mesh.checkpoint.directory import candidates, read_checkpoint
from megatron_mesh.checkpoint.load import Search
from megatron_mesh.checkpoint.save import Saver
from megatron_mesh.config.settings import with_values
from megatron_mesh.recurrence.schemes import Mixed
from megatron_mesh.runtime.distributed import process_groups
from megatron_mesh.train.loop import build_run
from tests.unit.train import fused_adam
from tests.unit.train.conftest import run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns a directory with checkpoints of steps 3 and 6 for a kind of run; made once per kind."""
    made = {}

    def get(tiny, bf16: bool = False, **settings):
        key = (bf16, *settings.items())
        if key not in made:
            directory = tmp_path_factory.mktemp("saved") / "run"
            config = tiny(bf16=bf16, save=str(directory), save_interval=3, eval_interval=2, **settings)
            made[key] = (directory, run(config))
        return made[key]

    return get


def assert_equal_tensors(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize("loads", ["the same", "torch's"])
@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_an_adam_that_counts_with_its_groups(tiny, tmp_path, monkeypatch, bf16, distributed, loads):
    """Like Transformer Engine's and apex's; resumes from its own checkpoint and from one of torch's AdamW."""
    settings = {"bf16": bf16, "use_distributed_optimizer": distributed}
    if loads == "the same":
        fused_adam.install(monkeypatch)
    straight = run(tiny(save=str(tmp_path), save_interval=3, **settings))
    fused_adam.install(monkeypatch)
    resumed = run(tiny(load=str(tmp_path / "iter_0000003"), **settings))
    assert {group["step"] for group in resumed.groups} == {6}
    if loads == "the same":
        assert resumed.values("loss") == straight.values("loss")[3:]
        assert_equal_tensors(resumed.optimizer, straight.optimizer)
    else:
        assert resumed.values("loss") == pytest.approx(straight.values("loss")[3:], rel=1e-3)


KINDS = {
    "fp32": {},
    "bf16": {"bf16": True},
    "loader processes": {"num_workers": 2},
    "no accumulation": {"micro_batch_size": 8},
    "float32 coefficients": {"bf16": True, "recurrence": "static"},
    "float32 coefficients, distributed": {
        "bf16": True,
        "recurrence": "dynamic",
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "several epochs": {"split": "4,48,48"},  # about 30 samples, 8 per step
}


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_bitwise(tiny, saved, kind):
    settings = KINDS[kind]
    bf16 = settings.get("bf16", False)
    directory, straight = saved(tiny, **settings)
    resumed = run(tiny(load=str(directory / "iter_0000003"), eval_interval=2, **settings))
    assert [r.step for r in resumed.records if r.kind == "train"] == [4, 5, 6]
    routers = () if "recurrence" in settings else ("router",)
    for name in ("loss", "lr", "grad_norm", "consumed_samples", *routers):
        assert resumed.values(name) == straight.values(name)[3:], name
    assert resumed.values("loss", "valid") == straight.values("loss", "valid")[1:]
    assert list(resumed.weights) == list(straight.weights)
    assert_equal_tensors(list(resumed.weights.values()), list(straight.weights.values()))
    assert_equal_tensors(resumed.optimizer, straight.optimizer)
    assert resumed.groups == straight.groups
    assert resumed.state == straight.state
    if bf16:
        dtypes = {w.dtype for name, w in straight.weights.items() if ".recurrence." not in name or routers}
        assert dtypes == {torch.bfloat16}
        assert {t.dtype for t in straight.optimizer} == {torch.float32}


def test_coefficients_that_were_saved_in_bfloat16(tiny, tmp_path, monkeypatch):
    """Older versions stored them in bfloat16. A resume loads main parameters, not the rounded weights."""
    settings = {"recurrence": "static", "bf16": True, "save": str(tmp_path), "lr": 1e-3}
    with monkeypatch.context() as earlier:
        earlier.setattr(Mixed, "full_precision", False)
        run(tiny(**settings, exit_interval=3))
        before = run(tiny(**settings, load=str(tmp_path), exit_interval=1, train_iters=3, lr_decay_iters=6))
    (name,) = (name for name in before.weights if ".recurrence." in name)
    with process_groups(config := tiny(**settings, load=str(tmp_path))):
        (coefficients,) = (
            build_run(config, Search(config.checkpoint)).stage.modules[0].decoder.recurrence.parameters()
        )
        assert coefficients.dtype == torch.float32
        assert torch.equal(coefficients.bfloat16(), before.weights[name])
        assert not torch.equal(coefficients.bfloat16().float(), coefficients)


def test_what_is_on_disk(tiny, saved):
    directory, straight = saved(tiny)
    assert (directory / "latest_checkpointed_iteration.txt").read_text() == "6"
    assert sorted(p.name for p in directory.iterdir() if p.is_dir()) == ["iter_0000003", "iter_0000006"]
    state = json.loads((directory / "iter_0000006" / "state.json").read_text())
    assert state["format_version"] == 3
    assert state["versions"]["megatron_core"] == "0.16.1"
    assert state["train_state"]["step"] == 6
    assert state["train_state"]["consumed_samples"] == 48
    assert state["train_state"]["train_loss"] == straight.values("loss")[-1]
    config = tiny(save=str(directory), load=str(directory))
    newest, earlier = candidates(config.checkpoint)
    assert (newest.name, earlier.name) == ("iter_0000006", "iter_0000003")
    assert read_checkpoint(newest).config.model == config.model


def test_an_interrupted_save_is_ignored(tiny, saved, tmp_path):
    """The remains of a killed run are not loaded and don't block the next save."""
    config = tiny(save=str(tmp_path), load=str(tmp_path), save_interval=3, train_iters=3, lr_decay_iters=6)
    left = tmp_path / "iter_0000003.partial"
    left.mkdir()
    (left / "__0_0.distcp").write_text("half")
    assert candidates(config.checkpoint) == []
    run(config)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["iter_0000003"]
    outcome = run(tiny(load=str(tmp_path)))
    assert outcome.values("loss") == saved(tiny)[1].values("loss")[3:]


def test_finetune_loads_only_the_weights(tiny, saved):
    directory, straight = saved(tiny)
    fresh = run(tiny())
    outcome = run(tiny(load=str(directory), finetune=True, lr=1e-3, seed=7))
    assert [r.step for r in outcome.records] == [1, 2, 3, 4, 5, 6]
    assert outcome.values("lr") == pytest.approx([lr / 10 for lr in fresh.values("lr")])
    assert outcome.values("loss")[0] < fresh.values("loss")[0] - 0.2
    assert straight.values("loss")[-1] == pytest.approx(outcome.values("loss")[0], abs=0.4)


def test_without_the_optimizer(tiny, saved):
    """As in Megatron-LM: step and data position are restored; optimizer and schedule restart."""
    directory, straight = saved(tiny)
    outcome = run(tiny(load=str(directory / "iter_0000003"), load_optim=False))
    assert [r.step for r in outcome.records] == [4, 5, 6]
    assert outcome.values("loss")[0] == straight.values("loss")[3]
    assert outcome.values("lr") == straight.values("lr")[:3]
    steps = [moment for moment in outcome.optimizer if moment.ndim == 0]
    assert {step.item() for step in steps} == {3.0}


def test_precision_may_change_without_the_optimizer(tiny, saved):
    directory, straight = saved(tiny)
    outcome = run(tiny(load=str(directory / "iter_0000003"), load_optim=False, bf16=True))
    assert outcome.values("loss")[0] == pytest.approx(straight.values("loss")[3], rel=1e-2)


def test_overriding_the_schedule(tiny, saved):
    directory, straight = saved(tiny)
    settings = {
        "override_opt_param_scheduler": True,
        "lr": 5e-3,
        "weight_decay": 0.2,
        "lr_decay_style": "linear",
    }
    outcome = run(tiny(load=str(directory / "iter_0000003"), **settings))
    assert outcome.values("lr") == pytest.approx(run(tiny(**settings)).values("lr")[3:])
    assert outcome.values("loss")[0] == straight.values("loss")[3]
    assert max(group["weight_decay"] for group in outcome.groups) == 0.2


def test_data_continue_with_another_batch_size(tiny, saved):
    directory, _ = saved(tiny)
    load = str(directory / "iter_0000003")
    outcome = run(tiny(load=load, global_batch_size=4, lr_decay_iters=6, train_iters=8))
    assert outcome.values("consumed_samples") == [28, 32, 36, 40, 44]


def draws() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(()).item()]


def test_generators_of_all_kinds(tiny, saved, tmp_path):
    """The run saves after drawing numbers that a new run would not draw."""
    config = tiny(save=str(tmp_path / "run"), train_iters=1, lr_decay_iters=6)
    with process_groups(config):
        random.seed(5)
        np.random.seed(5)
        torch.rand(11)
        parts = build_run(config)
        Saver(config).save(parts.stage, parts.optimizer, parts.state)
        expected = draws()
    for load_rng in (True, False):
        load = {"load": str(tmp_path / "run"), "save": None, "load_optim": False, "load_rng": load_rng}
        resumed = with_values(config, load)
        with process_groups(config):
            random.seed(6)
            np.random.seed(6)
            build_run(resumed, Search(resumed.checkpoint))
            assert (draws() == expected) == load_rng
