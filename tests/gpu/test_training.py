"""Training on GPUs: the losses are those on a CPU, and a resumed run is bitwise the uninterrupted one."""

from pathlib import Path

import pytest
import torch

from megatron_mesh.runtime import device, exits
from tests.end_to_end.runs import launch, losses, write_settings

LAYOUTS = [
    ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
    ("--pipeline-model-parallel-size", 2),
    ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
]


@pytest.fixture(autouse=True, scope="module")
def _on_a_gpu() -> None:
    if not device.has_gpu():
        pytest.skip("there is no GPU")


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Path:
    return write_settings(tmp_path_factory.mktemp("settings"))


def train(settings: Path, directory: Path, *flags: object, processes: int = 1, **where: str) -> list[float]:
    """Train in new processes and return the losses."""
    command = ("--config", settings, "--save", directory, *flags)
    result = launch(*command, processes=processes, **where)
    assert result.returncode in (exits.DONE, exits.STOPPED), result.stderr
    return losses(directory)


def test_losses_are_those_on_a_cpu(settings, tmp_path) -> None:
    there = train(settings, tmp_path / "gpu", "--transformer-impl", "local")
    here = train(settings, tmp_path / "cpu", CUDA_VISIBLE_DEVICES="")
    assert there == pytest.approx(here, rel=1e-4)  # float32 sums in a different order


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(settings, tmp_path, precision: str) -> None:
    flags = ("--deterministic-mode", *(["--bf16"] if precision == "bf16" else []))
    whole = train(settings, tmp_path / "whole", *flags)
    part = tmp_path / "part"
    train(settings, part, *flags, "--exit-interval", 3, "--async-save")
    assert train(settings, part, *flags, "--load", part) == whole


@pytest.mark.parametrize("layout", LAYOUTS, ids=["tp2-sp", "pp2", "dp2-overlap"])
def test_losses_on_two_gpus_are_those_on_one(settings, tmp_path, layout: tuple) -> None:
    """With NCCL, on rank layouts that tests/parallel covers with gloo."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    one = train(settings, tmp_path / "one", "--transformer-impl", "local")
    two = train(settings, tmp_path / "two", "--transformer-impl", "local", *layout, processes=2)
    assert two == pytest.approx(one, rel=1e-4)
