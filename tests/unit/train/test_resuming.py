"""Resuming with changed settings: each change is applied, logged or refused, but never silent."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mesh.checkpoint.compatible import check_same_run, describe_changes
from megatron_mesh.checkpoint.directory import read_checkpoint
from megatron_mesh.config.layout import batch_size_at, last_step
from megatron_mesh.config.resuming import RESUMING, Kind
from megatron_mesh.config.settings import flag, flatten, with_values
from megatron_mesh.data.indexed import IndexedWriter
from megatron_mesh.errors import UserError
from tests.unit.train.conftest import run


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory):
    """A run of 6 steps that stopped after 3."""
    made: dict[str, Path] = {}

    def get(tiny) -> str:
        if "run" not in made:
            made["run"] = tmp_path_factory.mktemp("three") / "run"
            run(tiny(save=str(made["run"]), exit_interval=3))
        return str(made["run"] / "iter_0000003")

    return get


def corpus_at(prefix: Path, seed: int) -> str:
    random = np.random.default_rng(seed)
    documents = [random.zipf(1.3, size=random.integers(20, 60)) % 128 for _ in range(300)]
    with IndexedWriter(str(prefix), np.uint16) as writer:
        writer.add(np.concatenate(documents).astype(np.uint16), np.array([len(d) for d in documents]))
        writer.commit()
    return str(prefix)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records if record.name == "megatron_mesh.train.loop"]
    return [line.removeprefix("resuming: ") for line in lines if line.startswith("resuming: ")]


def test_nothing_is_logged_if_nothing_changed(tiny, three_steps, caplog) -> None:
    run(tiny(load=three_steps(tiny), num_workers=1, log_interval=2, micro_batch_size=4, exit_interval=4))
    assert said(caplog) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"seed": 99},
            "--seed was 1234 in the checkpoint and is 99 now: the samples now come in a different order",
        ),
        (
            {"split": "90,10,0"},
            "--split was 80,10,10 in the checkpoint and is 90,10,0 now: the samples now come in a different "
            "order",
        ),
        (
            {"adam_beta2": 0.99},
            "--adam-beta2 was 0.95 in the checkpoint and is 0.99 now: the new value applies from this step",
        ),
        (
            {"adam_eps": 1e-6},
            "--adam-eps was 1e-08 in the checkpoint and is 1e-06 now: the new value applies from this step",
        ),
        (
            {"clip_grad": 0.5},
            "--clip-grad was 1.0 in the checkpoint and is 0.5 now: the new value applies from this step",
        ),
        (
            {"global_batch_size": 16},
            "--global-batch-size was 8 in the checkpoint and is 16 now: from this step on",
        ),
        (
            {"router_init_std": 0.1},
            "--router-init-std was 0.02 in the checkpoint and is 0.1 now: the weights come from the",
        ),
        ({"load_rng": False}, "--no-load-rng: the random number generators restart from --seed"),
        (
            {"load_optim": False, "adam_beta2": 0.99},
            "--no-load-optim: at step 3 of the run, Adam's moments restart at zero and the",
        ),
    ],
)
def test_changes_are_logged_with_their_meaning(tiny, three_steps, caplog, changes, words) -> None:
    run(tiny(load=three_steps(tiny), exit_interval=4, **changes))
    (line,) = said(caplog)
    assert line.startswith(words)
    if "order" in words:
        assert line.endswith("; training resumes at sample 24 of the new order")


def test_new_betas_are_used(tiny, three_steps) -> None:
    """config.yaml records them, so they must be what the optimizer uses."""
    outcome = run(tiny(load=three_steps(tiny), adam_beta1=0.8, adam_beta2=0.99, adam_eps=1e-6))
    assert {(tuple(group["betas"]), group["eps"]) for group in outcome.groups} == {((0.8, 0.99), 1e-6)}


def test_an_overridden_schedule_is_logged(tiny, three_steps, caplog) -> None:
    run(tiny(load=three_steps(tiny), lr=5e-3, override_opt_param_scheduler=True, exit_interval=4))
    (line,) = said(caplog)
    assert line.startswith(
        "--lr was 0.01 in the checkpoint and is 0.005 now: the new schedule applies from this step on"
    )


def test_data_changed_at_the_same_path(tiny, three_steps, corpus, tmp_path, caplog) -> None:
    prefix = corpus_at(tmp_path / "text", seed=0)
    config = tiny(save=str(tmp_path / "run"), data_path=[prefix], exit_interval=3)
    run(config)
    shutil.rmtree(f"{prefix}/cache")
    corpus_at(tmp_path / "text", seed=1)
    again = {"load": str(tmp_path / "run"), "data_path": [prefix], "exit_interval": 4}
    run(tiny(**again))
    (line,) = said(caplog)
    assert line.startswith("the training data have changed since the checkpoint: the samples")
    with pytest.raises(UserError, match="leave out --require-same-data"):
        run(tiny(**again, require_same_data=True))


def test_data_that_moved_are_the_same(tiny, three_steps, corpus, tmp_path, caplog) -> None:
    for ending in (".bin", ".idx"):
        shutil.copy(corpus + ending, tmp_path / f"moved{ending}")
    moved = str(tmp_path / "moved")
    run(tiny(load=three_steps(tiny), data_path=[moved], exit_interval=4, require_same_data=True))
    (line,) = said(caplog)
    moves = f"--data-path was {corpus} in the checkpoint and is {moved} now"
    assert line == f"{moves}: the samples and their order are the same"


def test_a_blend_instead_of_one_prefix(tiny, three_steps, corpus, tmp_path, caplog) -> None:
    blend = ["0.5", corpus, "0.5", corpus_at(tmp_path / "other", seed=2)]
    run(tiny(load=three_steps(tiny), data_path=blend, exit_interval=4))
    (line,) = said(caplog)
    assert f"--data-path was {corpus} in the checkpoint and is {' '.join(blend)} now: the samples now" in line


# Runs that count samples.

SCHEDULE = {"lr_decay_style": "linear", "lr_warmup_fraction": None}
SAMPLES = {"train_iters": None, "train_samples": 100, "lr_warmup_samples": 20, **SCHEDULE}


def rates(consumed: list[int]) -> list[float]:
    """Rates of the steps that begin after these samples: warm-up over 20, linear decay to 0 at 100."""
    return [0.01 * (n / 20 if n <= 20 else 1 - (n - 20) / 80) for n in consumed]


@pytest.mark.parametrize("batch", [8, 4, 2])
def test_samples_count_when_the_batch_size_changes(tiny, tmp_path, caplog, batch) -> None:
    """A run of 100 samples stops after 40. With another batch size, it and its schedule still end at 100."""
    first = run(tiny(**SAMPLES, global_batch_size=4, save=str(tmp_path), exit_interval=10))
    assert first.values("lr") == pytest.approx(rates(list(range(0, 40, 4))))
    rest = run(tiny(**SAMPLES, global_batch_size=batch, load=str(tmp_path)))
    begins = list(range(40, 100 - batch + 1, batch))
    assert rest.values("consumed_samples") == [n + batch for n in begins]
    assert rest.values("lr") == pytest.approx(rates(begins))
    assert [r.step for r in rest.records][-1] == 10 + len(begins)
    assert len(said(caplog)) == (batch != 4)


def test_a_run_that_counted_steps_can_count_samples(tiny, tmp_path) -> None:
    """The checkpoint counts steps of 4 samples. A schedule that is equal in samples continues it."""
    steps = {"train_iters": 25, "lr_decay_iters": 25, "lr_warmup_iters": 5, **SCHEDULE}
    run(tiny(**steps, global_batch_size=4, save=str(tmp_path), exit_interval=10))
    rest = run(tiny(**SAMPLES, global_batch_size=20, load=str(tmp_path)))
    assert rest.values("lr") == pytest.approx(rates([40, 60, 80]))
    with pytest.raises(
        UserError, match="--lr-decay-iters was 25 in the checkpoint and --lr-decay-samples is 90 now"
    ):
        run(tiny(**SAMPLES, lr_decay_samples=90, global_batch_size=20, load=str(tmp_path)))


def test_a_ramp_up_that_was_interrupted(tiny, tmp_path) -> None:
    """Batch sizes follow Megatron-LM's formula, samples come in order, and a resume is equal bit for bit."""
    settings = {**SAMPLES, "global_batch_size": 8, "rampup_batch_size": [2, 2, 36], "micro_batch_size": 2}
    straight = run(tiny(**settings, save=str(tmp_path), save_interval=9))
    consumed = [0]
    training = tiny(**settings).training
    while len(consumed) <= last_step(training):
        consumed.append(consumed[-1] + batch_size_at(training, consumed[-1]))
    assert straight.values("consumed_samples") == consumed[1:]
    assert np.unique(np.diff(consumed)).tolist() == [2, 4, 6, 8]
    assert straight.values("lr") == pytest.approx(rates(consumed[:-1]))
    assert len(straight.values("tokens_per_second")) == len(consumed) - 1
    resumed = run(tiny(**settings, load=str(tmp_path / "iter_0000009")))
    assert resumed.values("loss") == straight.values("loss")[9:]
    for name, weight in resumed.weights.items():
        assert torch.equal(weight, straight.weights[name]), name


def test_saving_settings_without_save(tiny, caplog) -> None:
    """Such settings cause only a warning, because runs with and without --save may share a file."""
    caplog.set_level(logging.WARNING)
    from megatron_mesh.train.output import warn_if_nothing_is_saved

    warn_if_nothing_is_saved(tiny(save_interval=3, keep_last=2))
    assert "no checkpoint will be saved: --save-interval, --keep-last without --save" in caplog.text


def test_changed_validation_data_are_logged(tiny, tmp_path, corpus, caplog) -> None:
    """Data are compared by content: a moved file is the same, a rewritten one is not."""
    other = corpus_at(tmp_path / "other", seed=3)
    data = {"data_path": None, "train_data_path": [corpus], "eval_interval": 2, "eval_iters": 1}
    run(tiny(**data, valid_data_path=[other], save=str(tmp_path / "run"), exit_interval=3))
    again = {**data, "load": str(tmp_path / "run"), "exit_interval": 4}
    for ending in (".bin", ".idx"):
        shutil.copy(other + ending, tmp_path / f"moved{ending}")
    run(tiny(**again, valid_data_path=[str(tmp_path / "moved")]))
    assert said(caplog) == []
    caplog.clear()
    shutil.rmtree(f"{other}/cache")
    corpus_at(tmp_path / "other", seed=4)
    run(tiny(**again, valid_data_path=[other], require_same_data=True))
    (line,) = said(caplog)
    assert line.startswith("the validation or test data have changed: their losses are not comparable")


def test_require_same_data_refuses_another_tokenizer(tiny, three_steps, tmp_path) -> None:
    checkpoint = read_checkpoint(Path(three_steps(tiny)))
    saved = {**checkpoint.train_state["fingerprints"], "tokenizer": "a"}
    state = {**checkpoint.train_state, "fingerprints": saved}
    checkpoint = replace(checkpoint, train_state=state)
    moved = tiny(tokenizer_model="elsewhere.json", require_same_data=True)
    assert describe_changes(checkpoint, moved, saved) == []
    with pytest.raises(UserError, match="the tokenizer has changed since the checkpoint"):
        describe_changes(checkpoint, tiny(require_same_data=True), {**saved, "tokenizer": "b"})


def test_a_checkpoint_without_data_fingerprints(tiny, three_steps) -> None:
    """Earlier versions didn't record fingerprints."""
    checkpoint = read_checkpoint(Path(three_steps(tiny)))
    now = checkpoint.train_state["fingerprints"]
    state = {name: value for name, value in checkpoint.train_state.items() if name != "fingerprints"}
    earlier = replace(checkpoint, train_state=state)
    (line,) = describe_changes(earlier, tiny(), now)
    assert "didn't record its training data" in line
    with pytest.raises(UserError, match="leave out --require-same-data"):
        describe_changes(earlier, tiny(require_same_data=True), now)


def test_earlier_versions_converted_samples_to_steps(tiny, tmp_path) -> None:
    """They rounded down: 100 samples in batches of 8 became 12 steps, of which a tenth, 1, was warm-up."""
    steps = {"train_iters": 12, "lr_decay_iters": 12, "lr_warmup_iters": 1, **SCHEDULE}
    run(tiny(**steps, save=str(tmp_path), exit_interval=3))
    samples = {"train_iters": None, "train_samples": 100, "lr_warmup_samples": 10, **SCHEDULE}
    assert run(tiny(**samples, load=str(tmp_path))).values("consumed_samples")[-1] == 96


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"hidden_size": 64}, "--load another checkpoint"),
        ({"rotary_percent": 0.5}, "--load another checkpoint"),
        ({"mesh_transition_query": "embedding"}, "--load another checkpoint"),
        ({"bf16": True}, "--no-load-optim"),
        ({"lr": 3e-3}, "--override-opt-param-scheduler"),
        ({"weight_decay": 0.2}, "--override-opt-param-scheduler"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_incompatible_settings_are_refused(tiny, three_steps, change, remedy) -> None:
    """Named here and not taken from the table of rules, which the test below follows."""
    checkpoint = read_checkpoint(Path(three_steps(tiny)))
    with pytest.raises(UserError, match=f"{flag(next(iter(change)))} was .*{remedy}"):
        check_same_run(checkpoint, with_values(checkpoint.config, change))


CHANGES: dict[str, Any] = {
    "layers": "1+1R3+1",
    "recurrence": "base",
    "split": "90,5,5",
    "lr_decay_style": "linear",
}


@pytest.mark.parametrize("name", [name for name, rule in RESUMING.items() if rule.kind is not Kind.FREE])
def test_each_kind_has_its_effect(tiny, three_steps, name) -> None:
    """Change one setting at a time, even if the result is no valid run."""
    checkpoint = read_checkpoint(Path(three_steps(tiny)))
    before = flatten(checkpoint.config)[name]
    value = CHANGES.get(
        name,
        (not before)
        if isinstance(before, bool)
        else (before or 0) + 1
        if not isinstance(before, str | list)
        else "x",
    )
    config = with_values(checkpoint.config, {name: value})
    ours = dict(checkpoint.train_state["fingerprints"])
    kind = RESUMING[name].kind
    if kind in (Kind.WEIGHTS, Kind.OPTIMIZER, Kind.SCHEDULE):
        with pytest.raises(UserError, match=flag(name)):
            check_same_run(checkpoint, config)
        return
    check_same_run(checkpoint, config)
    if kind is Kind.REPORTED:
        assert any(
            line.startswith(f"{flag(name)} was") for line in describe_changes(checkpoint, config, ours)
        )
        return
    stream = {Kind.ORDER: "train", Kind.TOKENIZER: "tokenizer", Kind.VALIDATION: "valid"}[kind]
    state = {**checkpoint.train_state, "fingerprints": {**ours, "valid": "a", "tokenizer": "a"}}
    now = {**ours, "valid": "a", "tokenizer": "a", stream: "b"}
    (line,) = describe_changes(replace(checkpoint, train_state=state), config, now)
    assert line.startswith(f"{flag(name)} was")
