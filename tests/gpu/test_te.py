"""Transformer Engine itself, which tests/unit/model replaces by a stand-in."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_mesh.model.implementation import why_no_transformer_engine
from megatron_mesh.runtime import device, exits
from tests.end_to_end.runs import launch, losses, write_settings
from tests.helpers import one_process, tiny_config

# Relative errors: the rounding of bfloat16 gradients and of different kernels, and a lost gradient.
CLOSE, WRONG = 0.02, 0.1
FP8 = ("--bf16", "--fp8-format", "hybrid", "--fp8-scope", "all", "--gradient-accumulation-fusion")


@pytest.fixture(autouse=True, scope="module")
def _has_transformer_engine() -> None:
    if not device.has_gpu():
        pytest.skip("there is no GPU")
    if missing := why_no_transformer_engine():
        pytest.skip(missing)


def _require_fp8(recipe: str = "tensorwise") -> None:
    if missing := device.why_no_fp8(recipe):
        pytest.skip(missing)


@pytest.fixture(scope="module")
def measured() -> Iterator[dict[str, Any]]:
    from tests.te_gradients import EVERYWHERE, gradients

    _require_fp8()
    with one_process(tiny_config()):
        yield gradients(EVERYWHERE)


@pytest.mark.parametrize("label", ["no FP8", "FP8"])
@pytest.mark.parametrize("loops", [1, 2, 3])
def test_fused_gradients_equal_unfused_ones(measured, loops: int, label: str) -> None:
    errors = measured[f"ours, K={loops}, {label}"]
    assert max(errors.values()) < CLOSE, errors


@pytest.mark.parametrize("loops", [2, 3])
def test_megatrons_flag_loses_gradients_in_a_loop(measured, loops: int) -> None:
    assert measured[f"naive, K={loops}, no FP8"]["first"] > WRONG
    assert min(measured[f"naive, K={loops}, FP8"].values()) > WRONG


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Path:
    return write_settings(tmp_path_factory.mktemp("settings"))


def train(settings: Path, directory: Path, *flags: object) -> list[float]:
    """Train in a new process and return the losses."""
    result = launch("--config", settings, "--save", directory, *flags)
    assert result.returncode in (exits.DONE, exits.STOPPED), result.stderr
    return losses(directory)


def test_learns_what_local_layers_learn(settings, tmp_path) -> None:
    ours = train(settings, tmp_path / "te", "--bf16", "--transformer-impl", "transformer_engine")
    local = train(settings, tmp_path / "local", "--bf16", "--transformer-impl", "local")
    assert ours == pytest.approx(local, rel=0.01)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "delayed"])
def test_fp8_learns_and_resumes_exactly(settings, tmp_path, recipe: str) -> None:
    """Hidden size 128 is one block of blockwise scaling."""
    _require_fp8(recipe)
    flags = (*FP8, "--fp8-recipe", recipe, "--hidden-size", 128, "--deterministic-mode")
    whole = train(settings, tmp_path / "whole", *flags)
    plain = train(settings, tmp_path / "plain", "--bf16", "--hidden-size", 128)
    assert whole == pytest.approx(plain, rel=0.05)
    part = tmp_path / "part"
    train(settings, part, *flags, "--exit-interval", 3)
    assert train(settings, part, *flags, "--load", part) == whole


def test_weights_in_fp8_learn_the_same(settings, tmp_path) -> None:
    _require_fp8()
    size = ("--hidden-size", 128, "--use-distributed-optimizer")
    kept = train(settings, tmp_path / "kept", *FP8, *size, "--fp8-param-gather")
    cast = train(settings, tmp_path / "cast", *FP8, *size)
    assert kept == pytest.approx(cast, rel=0.05)
