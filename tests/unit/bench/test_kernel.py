"""The kernel benchmark on a CPU: its arithmetic, and the whole command with torch in place of the kernels."""

import json
from pathlib import Path

import pytest
import torch

from megatron_mesh import kernels
from megatron_mesh.command import call
from megatron_mesh.errors import UserError
from megatron_mesh.recurrence.mixing import weighted_sum
from tools.bench.kernel import COPY, MixShape, main, measure_kernels, summarize

SHAPE = MixShape(sequence=5, batch=2, hidden=24, terms=3, dtype=torch.bfloat16)
SMALL = [
    "--seq-length",
    "5",
    "--micro-batch-size",
    "2",
    "--hidden-size",
    "24",
    "--rounds",
    "3",
    "--calls",
    "1",
]


def test_least_bytes_are_those_of_the_tensors() -> None:
    weights = torch.randn(5, 2, 3, requires_grad=True)
    states = [torch.randn(5, 2, 24).bfloat16().requires_grad_() for _ in range(3)]
    out = weighted_sum(weights, states)
    inputs = [weights, *states]
    assert SHAPE.least_bytes("forward") == sum(x.nbytes for x in (*inputs, out))
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert SHAPE.least_bytes("backward") == sum(x.nbytes for x in (*inputs, out, *grads))


def test_shares_are_of_the_copy_in_the_same_round() -> None:
    least = SHAPE.least_bytes("forward")
    seconds = {
        COPY: [1.0, 2.0, 4.0],
        ("way", "forward"): [2.0, 4.0, 8.0],
        ("way", "backward"): [1.0, 1.0, 1.0],
    }
    forward, backward = summarize(SHAPE, seconds, copy_bytes=least)
    assert (forward.direction, backward.direction) == ("forward", "backward")
    assert forward.share_of_copy.lower == forward.share_of_copy.median == forward.share_of_copy.upper == 0.25
    assert forward.milliseconds.median == 4000.0
    assert forward.gigabytes_per_second.median == least / 4 / 1e9


def test_every_implementation_is_timed_in_every_round() -> None:
    calls = []

    def spy(weights: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return weighted_sum(weights, states)

    found = measure_kernels(SHAPE, {"spy": spy, "torch": weighted_sum}, rounds=4, calls=2, copy_bytes=1000)
    assert {name: len(times) for name, times in found.items()} == {
        COPY: 4,
        **{(way, direction): 4 for way in ("spy", "torch") for direction in ("forward", "backward")},
    }
    assert all(time > 0 for times in found.values() for time in times)
    assert calls.count(False) == (4 + 1) * 2  # forward without gradients, twice in each round


def test_the_command_writes_a_file_and_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(kernels, "why_unavailable", lambda: None)
    monkeypatch.setattr(kernels, "weighted_sum", weighted_sum)
    monkeypatch.setattr("tools.bench.kernel.COPY_BYTES", 1000)
    call(main, [*SMALL, "--terms", "2", "3", "--output", str(tmp_path / "kernel.json")])
    results = json.loads((tmp_path / "kernel.json").read_text())["results"]
    assert list(results) == ["2", "3"]
    assert [(row["direction"], row["implementation"]) for row in results["3"]] == [
        (direction, way) for direction in ("forward", "backward") for way in ("kernel", "torch")
    ]
    table = capsys.readouterr().out
    assert len([line for line in table.splitlines() if " kernel " in line]) == 4


@pytest.mark.skipif(kernels.available(), reason="the kernels run here")
def test_reports_a_missing_gpu() -> None:
    with pytest.raises(UserError, match="the kernels cannot run"):
        call(main, SMALL)


def test_rejects_mistakes_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 1"):
        call(main, [*SMALL, "--terms", "0"])
    with pytest.raises(UserError, match="cannot be written"):
        call(main, [*SMALL, "--output", str(tmp_path / "none" / "kernel.json")])
    with pytest.raises(UserError, match="cannot be written"):
        call(main, [*SMALL, "--output", str(tmp_path)])
