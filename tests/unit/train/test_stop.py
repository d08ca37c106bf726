"""Requests to stop during an evaluation, which may outlast a job's time, and in a run without --save."""

import os
import signal

import pytest

from megatron_mesh.runtime import exits, phases
from megatron_mesh.train import pretrain
from tests.unit.train.conftest import run
from tests.unit.train.test_outputs import read


@pytest.fixture
def signal_in_evaluation(monkeypatch):
    """Sends this process a signal when it enters its ``number``-th evaluation."""

    def arrange(number: int) -> None:
        entered = []

        def listen(phase: str) -> None:
            if phase == "evaluation":
                entered.append(phase)
                if len(entered) == number:
                    os.kill(os.getpid(), signal.SIGUSR1)

        monkeypatch.setattr(phases, "_listeners", [listen])

    return arrange


@pytest.mark.parametrize("save_interval", [None, 4])
def test_a_stop_during_an_evaluation_saves_a_checkpoint(
    tiny, tmp_path, signal_in_evaluation, save_interval, monkeypatch
) -> None:
    """It saves once, whether a save was due or not, and loses only the result of the evaluation."""
    straight = run(tiny(eval_interval=2, eval_iters=3))
    settings = {"eval_interval": 2, "eval_iters": 3, "save": str(tmp_path), "load": str(tmp_path)}
    signal_in_evaluation(2)
    assert pretrain(tiny(**settings, save_interval=save_interval)) == exits.STOPPED
    kinds = [(r["kind"], r["step"]) for r in read(tmp_path / "metrics.jsonl") if r["kind"] != "train"]
    assert kinds == [("valid", 2), ("save", 4), ("summary", 4)]
    assert (tmp_path / "run_status.txt").read_text() == "stopped\n"
    monkeypatch.undo()
    assert pretrain(tiny(**settings)) == exits.DONE
    losses = [r["loss"] for r in read(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert losses == straight.values("loss")


def test_the_save_comes_before_the_evaluation(tiny, tmp_path) -> None:
    """So a job that is killed during the evaluation has its checkpoint."""
    pretrain(tiny(eval_interval=3, save_interval=3, save=str(tmp_path)))
    kinds = [(r["kind"], r["step"]) for r in read(tmp_path / "metrics.jsonl") if r["kind"] != "train"]
    assert kinds[:2] == [("save", 3), ("valid", 3)] and kinds[2:4] == [("save", 6), ("valid", 6)]


def test_a_background_checkpoint_is_published_during_an_evaluation(tiny, tmp_path, monkeypatch) -> None:
    found = []

    def listen(phase: str) -> None:
        if phase == "latest":
            found.append(seen[-1])
        seen.append(phase)

    seen: list[str] = []
    monkeypatch.setattr(phases, "_listeners", [listen])
    settings = {
        "async_save": True,
        "eval_interval": 3,
        "eval_iters": 20,
        "train_iters": 3,
        "split": "10,90,0",
    }
    pretrain(tiny(**settings, save=str(tmp_path)))
    kinds = [(r["kind"], r["step"]) for r in read(tmp_path / "metrics.jsonl") if r["kind"] != "train"]
    assert kinds == [("save", 3), ("valid", 3), ("summary", 3)] and found == ["rename"]


def test_a_stop_during_the_test_leaves_it_to_the_next_start(
    tiny, tmp_path, signal_in_evaluation, monkeypatch
) -> None:
    settings = {"eval_interval": 100, "eval_iters": 3, "save": str(tmp_path), "load": str(tmp_path)}
    signal_in_evaluation(2)  # after that of the last step
    assert pretrain(tiny(**settings)) == exits.STOPPED
    monkeypatch.undo()
    assert pretrain(tiny(**settings)) == exits.DONE
    records = read(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "test"] == [6]
    assert [r["step"] for r in records if r["kind"] == "save"] == [6]


def test_a_stop_during_the_last_validation_leaves_it_to_the_next_start(
    tiny, tmp_path, signal_in_evaluation, monkeypatch, capsys
) -> None:
    """Status, log and summary agree that the run is not done; the next start does the missing evaluation."""
    settings = {"eval_interval": 3, "eval_iters": 3, "split": "80,20,0"}
    settings |= {"save": str(tmp_path), "load": str(tmp_path)}
    signal_in_evaluation(2)
    assert pretrain(tiny(**settings)) == exits.STOPPED
    assert (tmp_path / "run_status.txt").read_text() == "stopped\n"
    assert "valid loss step    3" in capsys.readouterr().out
    monkeypatch.undo()
    assert [pretrain(tiny(**settings)) for _ in range(2)] == [exits.DONE, exits.DONE]
    records = read(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "valid"] == [3, 6]
    assert [r["step"] for r in records if r["kind"] == "save"] == [6]


def test_a_stop_without_save_has_its_own_status(tiny, tmp_path, signal_in_evaluation, caplog) -> None:
    """It has its own exit status, and the log says that nothing was saved."""
    caplog.set_level("INFO", logger="megatron_mesh")
    signal_in_evaluation(1)
    ending = pretrain(tiny(eval_interval=2, eval_iters=3, output_dir=str(tmp_path)))
    assert ending == exits.STOPPED_UNSAVED == 43
    assert "stopped after step 2: SIGUSR1; no checkpoint was saved, because there is no --save" in caplog.text
