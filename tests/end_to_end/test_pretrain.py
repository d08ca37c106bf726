"""The program on its command line: plain python and torchrun, its configuration file, its errors."""

import os
from pathlib import Path

import pytest
import torch

from megatron_mesh.errors import UserError
from megatron_mesh.runtime import device
from pretrain_mesh import main
from tests.end_to_end.runs import launch, losses, write_settings


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Use one thread, as the launched processes do, so that sums are equal bit for bit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Path:
    """The YAML file of ``write_settings``."""
    return write_settings(tmp_path_factory.mktemp("settings"))


@pytest.fixture(scope="module")
def single(settings, tmp_path_factory) -> Path:
    """The output directory of a run in one process, with checkpoints."""
    directory = tmp_path_factory.mktemp("single") / "run"
    result = launch("--config", settings, "--save", directory, "--save-interval", 3)
    assert result.returncode == 0, result.stderr
    assert "step 6/6 | loss" in result.stdout
    assert "validation loss" in result.stdout
    assert f"saved {directory}/iter_0000006 in " in result.stdout
    assert "Warning" not in result.stderr
    return directory


def test_files(single):
    names = {path.name for path in single.iterdir()}
    expected = {"config.yaml", "metrics.jsonl", "run_status.txt", "latest_checkpointed_iteration.txt"}
    assert names == expected | {"iter_0000003", "iter_0000006"}
    assert len(losses(single)) == 6
    assert losses(single)[-1] < losses(single)[0] - 0.3
    assert len(losses(single, "valid")) == 2
    assert len(losses(single, "test")) == 1


def test_a_ring_of_two_processes_trains_as_one(settings, single, tmp_path):
    """``tests/parallel`` covers many more layouts."""
    ring = ("--pipeline-model-parallel-size", 2)
    result = launch("--config", settings, "--output-dir", tmp_path, *ring, processes=2)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path) == pytest.approx(losses(single), abs=1e-5)
    assert losses(tmp_path, "valid") == pytest.approx(losses(single, "valid"), abs=1e-5)


def test_two_tensor_parallel_processes_train_as_one(settings, single, tmp_path):
    """One process can resume from their checkpoint, too."""
    flags = (
        "--tensor-model-parallel-size",
        2,
        "--sequence-parallel",
        "--save",
        tmp_path,
        "--save-interval",
        3,
    )
    result = launch("--config", settings, *flags, processes=2)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path) == pytest.approx(losses(single), abs=1e-5)
    assert losses(tmp_path, "valid") == pytest.approx(losses(single, "valid"), abs=1e-5)
    resumed = ["--load", str(tmp_path / "iter_0000003"), "--output-dir", str(tmp_path / "resumed")]
    main(["--config", str(settings), *resumed])
    assert losses(tmp_path / "resumed") == pytest.approx(losses(single)[3:], abs=1e-5)


def test_the_written_configuration_starts_the_same_run(single, tmp_path):
    config = ["--config", str(single / "config.yaml")]
    with pytest.raises(UserError, match="already holds checkpoints"):
        main(config)
    main([*config, "--save", str(tmp_path)])
    assert losses(tmp_path) == losses(single)
    assert losses(tmp_path, "test") == losses(single, "test")


def test_errors_are_one_line(settings):
    result = launch("--config", settings, "--hiden-size", 64)
    assert result.returncode == 2
    assert result.stderr == "error: unknown setting --hiden-size; did you mean --hidden-size?\n"
    assert not result.stdout


@pytest.mark.parametrize("asked, status", [("transformer_engine", 2), ("local", 0)])
def test_an_unusable_transformer_engine_is_one_message(settings, tmp_path, asked, status) -> None:
    """A run that doesn't need it works. Megatron-core alone would end with a traceback."""
    broken = tmp_path / "transformer_engine"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    result = launch(
        *["--config", settings, "--save", tmp_path / "run", "--train-iters", 2, "--transformer-impl", asked],
        PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    )
    assert result.returncode == status, result.stderr
    if status:
        (line,) = result.stderr.splitlines()
        broken_on_gpu = ("libcudart.so.13", "reinstall it", "uninstall")
        why = broken_on_gpu if device.has_gpu() else ("there is no GPU",)
        assert all(words in line for words in (*why, "--transformer-impl local")), line
