"""Verdicts on targets, and the peak memory of a variant, from invented numbers."""

from dataclasses import replace

import pytest

from megatron_mesh.runtime import device
from tools.bench import report as module
from tools.bench.measure import MemoryMeter, Times
from tools.bench.report import StepReport, VariantResult, targets
from tools.bench.settings import StepSettings, complete


def result(seconds: float, gigabytes: int | None = None) -> VariantResult:
    """Three steps of ``seconds`` each. With 65,536 tokens per step, 1 s makes 65,536 FLOP/s of 100,000."""
    times = Times([seconds] * 3, [0.0] * 3, [0.0] * 3)
    peak = None if gigabytes is None else gigabytes * 10**9
    return VariantResult(0, None, times, flops_per_token=1.0, peak_bytes=peak, peak_flops=1e5)


def verdicts(
    shape: str, bf16: bool = True, num_micro_batches: int = 8, **results: VariantResult
) -> list[tuple[float | None, str]]:
    settings = complete(StepSettings(shape=shape, bf16=bf16, num_micro_batches=num_micro_batches), gpu=True)
    settings = replace(settings, micro_batch_size=32 // num_micro_batches)
    by_name = {name.replace("_", "-"): each for name, each in results.items()}
    return [(target.measured, target.verdict) for target in targets(StepReport(settings, by_name, {}))]


NONE = (None, "not measured here")


def on(monkeypatch: pytest.MonkeyPatch, gpu: str | None) -> None:
    """Pretend that the first of two GPUs is ``gpu``, or that there is no GPU."""
    names = [] if gpu is None else [(gpu, ""), ("NVIDIA H200", "")]
    monkeypatch.setattr(module.device, "gpus", lambda: names)


def test_verdicts_on_an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "NVIDIA H200")
    found = verdicts(
        "1.4b", plain=result(2.0), base=result(1.0, 100), mesh=result(1.005, 103), eager=result(1.5)
    )
    assert found == [
        (pytest.approx(1.005), "met"),
        (pytest.approx(1.03), "missed"),
        (pytest.approx(2 / 1.005), "met"),
        (pytest.approx(0.65536 / 1.005), "met"),
        NONE,
        (pytest.approx(1.5 / 1.005), "missed"),
    ]
    assert verdicts("1b", mesh=result(1.0))[3] == NONE, "this target is for larger shapes only"
    assert verdicts("6.9b-slice", mesh=result(2.0))[3] == (pytest.approx(0.32768), "missed")
    wide = verdicts(
        "6.9b-slice", base=result(1.0), base_fp8=result(0.5), mesh=result(1.3), mesh_fp8=result(1.0)
    )
    assert wide[4] == (pytest.approx(1.3), "met")
    assert verdicts("6.9b-slice", base=result(1.0), base_fp8=result(0.9))[4][1] == "missed"
    assert verdicts("1.4b", base=result(1.0), base_fp8=result(0.5))[4] == NONE


def test_other_machines_and_settings_have_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    here, h200 = {"bf16": True, "num_micro_batches": 8}, "NVIDIA H200"
    elsewhere = (
        (None, here),
        ("NVIDIA A100-SXM4-80GB", here),
        ("NVIDIA H200 MIG 1g.18gb", here),
        (h200, here | {"bf16": False}),
        (h200, here | {"num_micro_batches": 4}),
    )
    for gpu, changes in elsewhere:
        on(monkeypatch, gpu)
        found = verdicts("1.4b", base=result(1.0, 100), mesh=result(1.0, 100), **changes)
        assert found[0] == (1.0, "not measured here")
        assert {verdict for _, verdict in found} == {"not measured here"}


class Allocator:
    """Stands in for torch's allocator on a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = self.peak = 1000  # memory that belongs to no variant
        monkeypatch.setattr(device, "allocated_bytes", lambda: self.now)
        monkeypatch.setattr(device, "peak_memory_bytes", lambda: self.peak)
        monkeypatch.setattr(device, "reset_peak_memory", lambda: setattr(self, "peak", self.now))
        self.retries = 3  # from building the models
        monkeypatch.setattr(device, "allocation_retries", lambda: self.retries)

    def use(self, stays: int, temporary: int = 0) -> None:
        self.now += stays
        self.peak = max(self.peak, self.now + temporary)


def test_peak_memory_excludes_other_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, meter = Allocator(monkeypatch), MemoryMeter()
    for name, size in (("a", 100), ("b", 10)):
        with meter.charged(name):
            gpu.use(size, temporary=500)  # temporary memory while building doesn't count
    for measured in (False, True, True):
        for name, state, activations in (("a", 20, 50), ("b", 2, 300)):
            with meter.charged(name, measured=measured):
                gpu.use(0 if measured else state, temporary=activations)
                if name == "b":
                    gpu.retries += 1
    assert (meter.peak("a"), meter.peak("b")) == (100 + 20 + 50, 10 + 2 + 300)
    assert (meter.retries("a"), meter.retries("b")) == (0, 2), "only measured turns count"


def test_there_is_no_peak_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "allocated_bytes", lambda: None)
    meter = MemoryMeter()
    with meter.charged("a", measured=True):
        pass
    assert meter.peak("a") is None
