"""The step benchmark on a GPU: every kind of variant, at a small size in bf16."""

import json
from pathlib import Path

import pytest

from megatron_mesh import kernels
from megatron_mesh.command import call
from megatron_mesh.runtime import device
from tools.bench.steps import main
from tools.bench.variants import why_skipped

IN_FP8 = ("base-fp8", "mesh-fp8")
VARIANTS = ("plain", "base", "residual", "anchor", "mesh", "eager", *IN_FP8, "base-compiled")
SIZES = "--layers 1+2R2+1 --hidden-size 256 --num-attention-heads 4 --seq-length 128 --vocab-size 1024"


@pytest.fixture(autouse=True)
def _on_a_gpu() -> None:
    if not device.has_gpu():
        pytest.skip(device.why_no_gpu())


def test_every_variant_runs_and_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    output, traces = tmp_path / "report.json", tmp_path / "traces"
    own = f"--micro-batch-size 2 --steps 3 --output {output} --profile {traces} --variants"
    call(main, [*SIZES.split(), *own.split(), *VARIANTS])
    report = json.loads(output.read_text())
    skipped = {name: reason for name in IN_FP8 if (reason := why_skipped(name))}
    assert report["skipped"] == skipped and report["settings"]["bf16"]
    assert set(report["variants"]) == set(VARIANTS) - set(skipped)
    for name, variant in report["variants"].items():
        # Bytes per parameter: weights 2, gradients 4, main weights 4, moments 8; eager in float32 4, 4, 8.
        least = 16 if name == "eager" else 18
        assert variant["peak_memory_bytes"] > least * variant["parameters"], name
        assert variant["tokens_per_second"] > 0 and variant["model_tflops"] > 0
        assert (variant["share_of_peak"] is None) == (device.peak_flops("fp8" in name) is None)
        assert f"{name}.json" in {path.name for path in traces.iterdir()}
    assert report["parts"]["memory"].startswith("Triton" if kernels.available() else "torch")
    verdicts = {target["what"]: target["verdict"] for target in report["targets"]}
    on_h200 = "H200" in report["device"] and "MIG" not in report["device"]
    assert (verdicts["mesh / base, peak memory"] != "not measured here") == on_h200
