"""Test Transformer Engine's layers in a loop, with a stand-in that honours its documented contract.

``tests/te_stand_in/measure.py`` runs Megatron-core's real wrappers and our real model in a process in which
the stand-in can be imported. The tests here check its measurements.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
STAND_IN = ROOT / "tests" / "te_stand_in"
PHASES = ("first", "later", "after evaluation", "resumed")
# Unfused gradients of passes and micro-batches are summed in the weights' precision, and so are rounded.
NO_FP8, BF16 = 1e-6, 0.01
WRONG = 0.1


def start(*arguments: str, **variables: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(STAND_IN), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    command = [sys.executable, "-W", "ignore", str(STAND_IN / "measure.py"), *arguments]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result(process: subprocess.Popen) -> Any:
    try:
        out, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return json.loads(out)


@pytest.fixture(scope="module")
def processes() -> list[subprocess.Popen]:
    """Start three processes together: a single one, and two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [start(), *(start("two", RANK=str(r), LOCAL_RANK=str(r), **world) for r in range(2))]


@pytest.fixture(scope="module")
def measured(processes) -> dict[str, Any]:
    return result(processes[0])


@pytest.fixture(scope="module")
def two(processes) -> list[dict[str, Any]]:
    return [result(process) for process in processes[1:]]


@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("label, tolerance", [("no FP8", NO_FP8), ("FP8", BF16)])
def test_fused_gradients_equal_unfused_ones(measured, loops: int, label: str, tolerance: float) -> None:
    errors = measured["gradients"][f"ours, K={loops}, {label}"]
    assert set(errors) == set(PHASES)
    assert max(errors.values()) < tolerance, errors


def test_fused_gradients_of_recomputed_layers(measured) -> None:
    assert max(measured["gradients"]["ours, K=2, FP8, recomputed"].values()) < BF16


@pytest.mark.parametrize("loops", [2, 3])
def test_megatrons_flag_loses_gradients_in_a_loop(measured, loops: int) -> None:
    without, with_fp8 = (measured["gradients"][f"naive, K={loops}, {label}"] for label in ("no FP8", "FP8"))
    assert min(without["first"], without["resumed"]) > WRONG, without  # later the flag is never set
    assert min(with_fp8.values()) > WRONG, with_fp8  # with FP8 it is set again in every step


def test_megatrons_flag_is_right_without_a_loop(measured) -> None:
    """This shows that the errors in the test above come from the loop, not from the stand-in."""
    for label, tolerance in (("no FP8", NO_FP8), ("FP8", BF16)):
        assert max(measured["gradients"][f"naive, K=1, {label}"].values()) < tolerance


def test_on_a_ring_of_two_ranks(two) -> None:
    for rank in (each["ring"] for each in two):
        assert max(rank["ours"].values()) < BF16, rank
        assert rank["casts"] == [1]
        assert min(rank["naive, core"].values()) > WRONG, rank
        assert min(rank["naive, prelude"].values()) > WRONG, rank


def test_context_parallel_ranks_train_as_one(two) -> None:
    """Embedding, memory and layers work on half a sequence, the stand-in's attention on all of it."""
    for rank in (each["context"] for each in two):
        alone, shared = rank["losses"]
        assert shared == pytest.approx(alone, rel=1e-6)
        assert max(rank["errors"].values()) < 1e-5, rank["errors"]
        assert any("recurrence" in name for name in rank["errors"])


@pytest.mark.parametrize("settings", ["core", "all", "all, recompute", "all, mlp recompute"])
def test_a_weight_is_cast_once_a_step(measured, settings: str) -> None:
    """A step has 2 micro-batches and K = 2. Layers in bfloat16 are never cast."""
    ends = [0] if settings == "core" else [1]
    assert measured["casts"][settings] == {"prelude.0": ends, "core.0": [1], "coda.0": ends}


def test_blockwise_casts_in_every_pass(measured) -> None:
    assert measured["casts"]["blockwise"]["core.0"] == [2 * 2]


def test_first_and_last_layers_in_bf16(measured) -> None:
    in_fp8 = {name for name, casts in measured["casts"]["ends"].items() if casts != [0]}
    assert in_fp8 == {"prelude.1", "core.0", "coda.0"}


def test_the_recurrence_never_runs_in_fp8(measured) -> None:
    seen = measured["contexts"]
    assert seen["recurrence"] and not any(seen["recurrence"])
    assert seen["core"] and all(seen["core"])
    assert not any(seen["coda"]) and not any(seen["norm"])


def test_a_ring_chunk_marks_only_sections_that_no_earlier_chunk_runs(measured) -> None:
    assert measured["marks"] == [["prelude"], ["core"], [], [], ["coda"]]


def test_tensor_parallel_weights_are_marked(measured) -> None:
    """A rank needs the marks to draw its shard of the initial weights and to sum gradient norms."""
    ours, local = (
        {n.replace("layer_norm_", ""): d for n, d in measured["marked"][i].items() if d is not None}
        for i in ("transformer_engine", "local")
    )
    assert ours == local
    assert {"embedding.word_embeddings.weight", "output_layer.weight"} <= set(ours)


def test_a_history_of_one_micro_batch_covers_every_pass(measured) -> None:
    """With delayed scaling, the first pass may have the largest values, so the history needs all passes."""
    assert any(entry["largest"][0] > entry["largest"][1] * 1.001 for entry in measured["history"])
    for entry in measured["history"]:
        assert entry["rows"] == len(entry["largest"]) == 2
        assert entry["covered"] == pytest.approx(max(entry["largest"]), rel=1e-4)
        assert entry["flags"] == [None, None]


def test_resume_with_delayed_scaling_is_exact(measured) -> None:
    found = measured["delayed"]
    assert found["errors"]["kept"] == 0
    assert found["errors"]["left out"] > 1e-3
    assert found["of another length"] == 0
    # A run that stops before its first step saves what it has loaded.
    assert (found["errors"]["saved again, kept"], found["errors"]["saved again, left out"]) == (1, 0)


def test_state_of_delayed_scaling_is_plain_tensors(measured) -> None:
    """There are four tensors for each linear module of the core, the only section that runs in FP8."""
    modules = ("mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_proj", "self_attention.linear_qkv")
    tensors = ("amax_history_bwd", "amax_history_fwd", "scale_bwd", "scale_fwd")
    expected = [f"decoder.core.layers.{m}._extra_state.{t}" for m in modules for t in tensors]
    assert measured["delayed"]["keys"] == expected


@pytest.mark.parametrize("way", ["local to transformer_engine", "transformer_engine to local"])
def test_checkpoints_go_from_one_implementation_to_the_other(measured, way: str) -> None:
    found = measured["checkpoints"][way]
    saved, loaded = found["losses"]
    assert loaded == pytest.approx(saved, rel=1e-6)
    others = measured["checkpoints"]["transformer_engine to local"]["keys"]
    assert found["keys"] == others
    assert not [key for key in others if "extra_state" in key]


def test_losses_of_other_weights_differ(measured) -> None:
    """The test above loads over weights from another seed. It proves something only if those differ."""
    one, other = (found["losses"][0] for found in measured["checkpoints"].values())
    assert abs(one - other) > 1e-3 * one


def test_torchs_attention_in_transformer_engines_layers(measured) -> None:
    """``--attention-backend local`` uses another class and gives the same loss."""
    found = measured["attention"]
    assert [found[name]["classes"] for name in ("auto", "local")] == [
        ["TEDotProductAttention"],
        ["SDPAttention"],
    ]
    assert found["local"]["loss"] == pytest.approx(found["auto"]["loss"], rel=1e-3)
