"""Bad input is refused before anything is written."""

import importlib.util
import json
import re
import shutil

import pytest

from megatron_mesh.errors import UserError
from megatron_mesh.train import pretrain
from tests.exports import renew_checksums
from tests.unit.train.conftest import run, tree


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns a directory with a checkpoint of step 1 of 6."""
    made = []

    def get(tiny):
        if not made:
            made.append(tmp_path_factory.mktemp("saved") / "run")
            run(tiny(save=str(made[0]), train_iters=1, lr_decay_iters=6))
        return made[0]

    return get


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Runs ``pretrain``, and checks that it raises and leaves every file below ``watched`` unchanged."""
    monkeypatch.chdir(tmp_path)

    def check(config, message, watched=tmp_path):
        before = tree(watched)
        with pytest.raises(UserError, match=message):
            pretrain(config)
        assert tree(watched) == before
        assert not (tmp_path / "runs").exists()

    return check


def test_no_checkpoint_to_load(tiny, refused, tmp_path):
    refused(tiny(load=str(tmp_path / "absent")), "absent does not exist; give the directory")
    refused(tiny(load=str(tmp_path / "a"), save=str(tmp_path / "a"), finetune=True), "holds no checkpoint")


def test_save_holds_checkpoints_of_another_run(tiny, saved, refused, tmp_path):
    directory = saved(tiny)
    message = "already holds checkpoints.*--load"
    refused(tiny(save=str(directory)), message, directory)
    refused(tiny(save=str(directory), load=str(directory), finetune=True), message, directory)
    other = shutil.copytree(directory, tmp_path / "other")
    refused(tiny(save=str(directory), load=str(other)), message, directory)


def test_directories_that_cannot_be_written(tiny, refused, tmp_path):
    (tmp_path / "file").write_text("here")
    for name in ("save", "output_dir", "tensorboard_dir"):
        for directory in (tmp_path / "file", tmp_path / "file" / "below"):
            option = name.replace("_", "-")
            refused(tiny(**{name: str(directory)}), f"--{option} .*file.* cannot be written .*choose another")


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"hidden_size": 48}, "--hidden-size was 32 in the checkpoint and is 48 now"),
        (
            {"layers": "1+1R3+1"},
            r"--layers was 1\+1R2\+1 in the checkpoint and is 1\+1R3\+1 now.*"
            "--mesh-slots was 5 in the checkpoint and is 6",
        ),
        ({"recurrence": "base"}, "--recurrence was mesh in the checkpoint and is base now"),
        ({"vocab_size": 127}, "--vocab-size was 128 in the checkpoint and is 127 now"),
        ({"seq_length": 8}, "--seq-length was 16 in the checkpoint and is 8 now"),
    ],
)
def test_checkpoint_of_another_model(tiny, saved, refused, settings, difference):
    directory = saved(tiny)
    remedy = re.escape(f"--config {directory}/iter_0000001/config.yaml")
    refused(tiny(load=str(directory), **settings), f"a different model: .*{difference}.*{remedy}")


def test_checkpoint_of_another_precision(tiny, saved, refused):
    message = "precision: --bf16 was False in the checkpoint and is True now; .* --no-load-optim"
    refused(tiny(load=str(saved(tiny)), bf16=True), message)


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"lr": 2e-2}, "--lr was 0.01 in the checkpoint and is 0.02 now"),
        ({"train_iters": 9}, "--lr-decay-iters was 6 in the checkpoint and is 9 now"),
        ({"weight_decay": 0.1}, "--weight-decay was 0.01 in the checkpoint and is 0.1 now"),
    ],
)
def test_checkpoint_of_another_schedule(tiny, saved, refused, settings, difference):
    message = f"another learning-rate schedule: .*{difference}.*--override-opt-param-scheduler"
    refused(tiny(load=str(saved(tiny)), **settings), message)


def test_checkpoint_of_another_format(tiny, saved, refused, tmp_path):
    copy = shutil.copytree(saved(tiny), tmp_path / "copy") / "iter_0000001"
    state = copy / "state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, "format_version": 99}))
    renew_checksums(copy)
    refused(tiny(load=str(copy.parent)), "checkpoint format 99, .* reads only formats 2 and 3; use the")


def test_missing_data_and_tokenizer(tiny, refused, tmp_path):
    refused(tiny(data_path=None), "--data-path")
    refused(tiny(data_path=[str(tmp_path / "absent")]), "absent.idx does not exist")
    refused(tiny(tokenizer_model=str(tmp_path / "tokenizer.json")), "tokenizer.json does not exist")


def test_trackers_that_are_not_installed(tiny, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(tiny(wandb_project="p"), "--wandb-project needs the package wandb; pip install wandb")
    refused(tiny(tensorboard_dir=str(tmp_path / "t")), "--tensorboard-dir needs the package tensorboard")
