"""Full disks and wrong paths give a one-line error, and no step is lost."""

import errno
from pathlib import Path

import pytest

from megatron_mesh.checkpoint import save as save_module
from megatron_mesh.checkpoint.inspect import checkpoint_table, verify
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import exits
from megatron_mesh.train import pretrain
from tests.unit.train.test_outputs import read


def test_failed_saves_are_recorded_with_the_steps_at_risk(
    tiny, tmp_path, monkeypatch, caplog, capsys
) -> None:
    """They are in metrics.jsonl (for ``submit_slurm.py --status``) and in the log."""
    write = save_module.write_small_files

    def full(directory: Path, *args) -> None:
        if "0000002" not in directory.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(directory, *args)

    monkeypatch.setattr(save_module, "write_small_files", full)
    assert pretrain(tiny(save=str(tmp_path), save_interval=2)) == exits.NOT_SAVED
    records = [r for r in read(tmp_path / "metrics.jsonl") if r["kind"].startswith("save")]
    assert [(r["kind"], r["step"], r.get("steps_at_risk")) for r in records] == [
        ("save", 2, None),
        ("save_failed", 4, 2),
        ("save_failed", 6, 4),
    ]
    assert records[1]["reason"].startswith("No space left on device (rank 0 on ")
    assert (
        "later saves try again; last complete checkpoint: step 2; steps at risk until then: 4" in caplog.text
    )
    assert "save_failed" not in capsys.readouterr().out  # the line above is enough


@pytest.mark.parametrize("blocked", ["out", "out/metrics.jsonl", "out/config.yaml.partial"])
def test_output_that_cannot_be_written_is_one_line(tiny, tmp_path, blocked: str) -> None:
    """The directory or one of its files exists with another type, so not even root can write it."""
    path = tmp_path / blocked
    if blocked == "out":
        path.touch()
    else:
        path.mkdir(parents=True)
    load = {"load": str(tmp_path / "run"), "save": str(tmp_path / "run")}
    pretrain(tiny(train_iters=2, lr_decay_iters=6, **load))
    with pytest.raises(UserError, match=r"cannot be written \(.*(File exists|Is a directory)") as refusal:
        pretrain(tiny(train_iters=3, lr_decay_iters=6, output_dir=str(tmp_path / "out"), **load))
    assert "\n" not in str(refusal.value)


def test_steps_at_risk_count_from_the_checkpoint_that_was_loaded(tiny, tmp_path, monkeypatch) -> None:
    """It may be in another directory."""
    pretrain(tiny(save=str(tmp_path / "first"), exit_interval=3))

    def full(directory: Path, *args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save_module, "write_small_files", full)
    assert pretrain(tiny(load=str(tmp_path / "first"), save=str(tmp_path / "second"))) == exits.NOT_SAVED
    (failed,) = [r for r in read(tmp_path / "second/metrics.jsonl") if r["kind"] == "save_failed"]
    assert (failed["step"], failed["steps_at_risk"]) == (6, 3)


@pytest.mark.parametrize("async_save", [False, True])
def test_list_shows_the_step_of_a_loss(tiny, tmp_path, async_save: bool) -> None:
    """Not every step is logged, and a validation loss is added after its checkpoint is complete."""
    steps = {"save_interval": 2, "log_interval": 4, "eval_interval": 3}
    pretrain(tiny(save=str(tmp_path), async_save=async_save, **steps))
    logged = {
        (r["kind"], r["step"]): f"{r['loss']:.4f}" for r in read(tmp_path / "metrics.jsonl") if "loss" in r
    }
    second, fourth, sixth = checkpoint_table(tmp_path).splitlines()[1:]
    assert f"{logged['train', 1]} (step 1)" in second and "valid" not in second
    assert f"{logged['train', 4]}  " in fourth and f"{logged['valid', 3]} (step 3)" in fourth
    assert f"{logged['train', 6]}  " in sixth and f"{logged['valid', 6]}  " in sixth
    assert verify(tmp_path) == 0
    (tmp_path / "iter_0000006/validation.json").write_text("cut o")
    assert f"{logged['valid', 3]} (step 3)" in checkpoint_table(tmp_path).splitlines()[-1]


def test_load_describes_a_wrong_path(tiny, tmp_path) -> None:
    (tmp_path / "config.yaml").touch()
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (model / name).touch()
    (tmp_path / "theirs/iter_0000010/mp_rank_00").mkdir(parents=True)
    cases = {
        tmp_path / "config.yaml": "is a file; give the directory of a run",
        model: f"is a Hugging Face model; .* tools/convert_from_hf.py --load {model} --save NEW",
        tmp_path / "theirs": "holds a checkpoint in Megatron-LM's own format",
        tmp_path / "absent": r"does not exist; give the directory of a run",
    }
    for path, words in cases.items():
        with pytest.raises(UserError, match=words):
            pretrain(tiny(load=str(path)))


def test_a_run_logs_once_where_it_resumes(tiny, tmp_path, caplog) -> None:
    """The log names the step and the checkpoint, here from another run's directory."""
    caplog.set_level("INFO", logger="megatron_mesh")
    pretrain(tiny(save=str(tmp_path / "a"), train_iters=4, lr_decay_iters=6))
    pretrain(tiny(save=str(tmp_path / "b"), load=str(tmp_path / "a"), train_iters=6, lr_decay_iters=6))
    said = [message for message in caplog.messages if message.startswith("resumed")]
    assert said == [f"resumed at step 4 from {tmp_path}/a/iter_0000004"]
    pretrain(tiny(save=str(tmp_path / "c"), load=str(tmp_path / "a"), finetune=True, train_iters=1))
    assert f"started a new run from the weights of {tmp_path}/a/iter_0000004" in caplog.messages
