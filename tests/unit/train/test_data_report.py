"""The log describes a run's data at the start, and the samples of a skipped step."""

import logging

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mesh.data.indexed import IndexedWriter
from megatron_mesh.train.data import describe_data, describe_sources
from megatron_mesh.train.loop import build_run, pretrain
from tests.helpers import one_process
from tests.unit.train.test_outputs import read


@pytest.fixture
def blend(corpus, tmp_path):
    """A small source and the corpus, blended one to three."""
    with IndexedWriter(str(tmp_path / "small"), np.uint16) as writer:
        writer.add(np.arange(1700) % 128, np.full(17, 100))
        writer.commit()
    return ["1", str(tmp_path / "small"), "3", corpus]


def test_the_sources_of_each_stream_at_the_start(tiny, blend, caplog, tmp_path):
    """The log has shares, tokens and epochs of a blend, for training and for validation."""
    caplog.set_level(logging.INFO, "megatron_mesh")
    settings = {"data_path": blend, "split": "50,50,0", "eval_interval": 2, "eval_iters": 1}
    pretrain(tiny(**settings, train_iters=2, output_dir=str(tmp_path / "out")))
    (said,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("train data")]
    train, small, large, valid, *rest = said.splitlines()
    assert train == "train data: 16 samples of 16 tokens, 256 tokens"
    # The training half of 17 documents of 100 tokens is 8 of them: 49 samples. A quarter of 16 is 4.
    assert small == f"  25.00% from {blend[1]}: 784 tokens, 0.0816 epochs"
    assert large.startswith(f"  75.00% from {blend[3]}: ")
    assert valid == "valid data: 8 samples of 16 tokens, 128 tokens" and len(rest) == 2


def test_the_sources_of_a_resumed_run_and_of_some_samples(tiny, blend):
    """The small source ends after 49 x 4 samples and is then read a second time."""
    config = tiny(data_path=blend, split="50,50,0", train_iters=40)
    with one_process(config):
        stream = build_run(config).data.train
    train, small, _ = describe_data("train", stream, 16, consumed_samples=32)
    assert train == "train data: 320 samples of 16 tokens, 5,120 tokens, starting at sample 32"
    assert small == f"  25.00% from {blend[1]}: 784 tokens, 1.63 epochs (0.163 done)"
    assert sorted(describe_sources(stream, range(8)).split(", ")) == [
        f"2 of {blend[1]} (epoch 1)",
        f"6 of {blend[3]} (epoch 1)",
    ]
    assert f"2 of {blend[1]} (epoch 2)" in describe_sources(stream, range(240, 248))


def test_each_validation_set_has_its_loss(tiny, corpus, blend, tmp_path, capsys):
    """The validation loss is the mean of the sets' losses wherever the run reports it."""
    settings = {"data_path": None, "train_data_path": [corpus], "eval_interval": 3, "eval_iters": 2}
    alone = {}
    for name, prefix in (("same", corpus), ("small", blend[1])):
        config = tiny(**settings, valid_data_path=[prefix], output_dir=str(tmp_path / name))
        pretrain(config)
        rows = read(tmp_path / name / "metrics.jsonl")
        alone[name] = [row["loss"] for row in rows if row["kind"] == "valid"]
        assert all("sets" not in row for row in rows)
    capsys.readouterr()
    sets = [f"same={corpus}", f"small={blend[1]}"]
    config = tiny(
        **settings,
        valid_data_path=sets,
        output_dir=str(tmp_path / "both"),
        tensorboard_dir=str(tmp_path / "events"),
    )
    pretrain(config)
    rows = read(tmp_path / "both" / "metrics.jsonl")
    valid = [row for row in rows if row["kind"] == "valid"]
    assert len(valid) == 2
    for i, row in enumerate(valid):
        assert row["sets"] == pytest.approx({name: losses[i] for name, losses in alone.items()})
        assert row["loss"] == pytest.approx((row["sets"]["same"] + row["sets"]["small"]) / 2)
    assert rows[-1]["valid_loss"] == valid[-1]["loss"]
    line = f"same {valid[-1]['sets']['same']:.4f} | small {valid[-1]['sets']['small']:.4f}"
    assert f"validation loss {valid[-1]['loss']:.4f} | perplexity" in (out := capsys.readouterr().out)
    assert line in out
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    small = [event.value for event in events.Scalars("valid/small")]
    assert small == pytest.approx([row["sets"]["small"] for row in valid])
