"""Summarize measured steps as medians, rates, ratios between variants and targets, and write them as JSON."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from statistics import quantiles
from typing import Any, Literal

import torch

import megatron_mesh
from megatron_mesh.config.layout import parse_layers
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import device
from tools.bench.measure import SavedTensors, Times
from tools.bench.settings import EAGER, FP8, PLAIN, StepSettings

PARTS = ("forward_backward", "communication", "optimizer", "step")
COMPARED = ("forward_backward", "optimizer", "step")
"""Parts that are compared between variants. In one process, communication takes almost no time."""
_WIDTH_1B4, _DEPTH_1B4 = 2048, 24
_WIDTH_6B9 = 4096
_MICRO_BATCHES = 8
_PACKAGES = (
    "megatron-core",
    "transformer-engine",
    "flash-attn",
    "flash-attn-3",
    "apex",
    "triton",
    "transformers",
)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarize one or more values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.lower:.3f}-{self.upper:.3f})"


@dataclass(frozen=True)
class VariantResult:
    """Measurements of one variant."""

    parameters: int
    saved: SavedTensors | None
    """Tensors saved for backward; counted only for Megatron's layers without FP8 and compilation."""
    times: Times
    flops_per_token: float = 0.0
    """FLOPs per token of the unrolled network, forward and backward (``config/sizes.py``)."""
    peak_bytes: int | None = None
    """Peak memory in a measured step; None on a CPU."""
    peak_flops: float | None = None
    """FLOP/s from the device's data sheet in the variant's precision; None if unknown."""
    retries: int = 0
    """Allocation retries in measured steps (see ``MemoryMeter.retries``)."""

    def rates(self, tokens_per_step: int) -> dict[str, float | None]:
        """Compute tokens/s, model TFLOP/s and the share of the device's peak from the median step."""
        tokens_per_second = tokens_per_step / Spread.of(self.times.step).median
        flops = self.flops_per_token * tokens_per_second
        return {
            "tokens_per_second": tokens_per_second,
            "model_tflops": flops / 1e12,
            "share_of_peak": flops / self.peak_flops if self.peak_flops else None,
        }


@dataclass(frozen=True)
class StepReport:
    """Results of a whole comparison, in the order of the variants. The settings are complete."""

    settings: StepSettings
    results: Mapping[str, VariantResult]
    skipped: Mapping[str, str]
    """Variants that could not run here, and why."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Implementations that Megatron's variants used for the layers, the memory and the optimizer's step."""


def ratios(results: Mapping[str, VariantResult]) -> dict[str, dict[str, Spread]]:
    """Divide each variant's times by those of each earlier one: ``{"mesh / base": {part: spread}}``.

    Ratios are taken within a round, since whatever slows a round down slows both variants.
    """
    found: dict[str, dict[str, Spread]] = {}
    for below, above in combinations(results, 2):
        parts = found[f"{above} / {below}"] = {}
        for part in COMPARED:
            parts[part] = ratio(results[above], results[below], part)
    return found


def ratio(above: VariantResult, below: VariantResult, part: str = "step") -> Spread:
    """Divide the times of ``above`` by those of ``below``, round by round."""
    pairs = zip(getattr(above.times, part), getattr(below.times, part), strict=True)
    return Spread.of([a / b for a, b in pairs])


@dataclass(frozen=True)
class StepTarget:
    """A figure with the value that it should reach on one H200 in bf16."""

    what: str
    bound: Literal["at most", "at least"]
    limit: float
    measured: float | None
    """None if the report lacks the figure."""
    applies: bool
    """Whether the target is for this run: an H200, bf16 and enough micro-batches per step."""

    @property
    def verdict(self) -> str:
        """Met, missed or not measured here."""
        if self.measured is None or not self.applies:
            return "not measured here"
        met = self.measured <= self.limit if self.bound == "at most" else self.measured >= self.limit
        return "met" if met else "missed"


def targets(report: StepReport) -> list[StepTarget]:
    """List all targets, measured or not."""
    settings, results = report.settings, report.results
    on_h200 = any("H200" in name and " MIG " not in name for name, _ in device.gpus()[:1])
    applies = on_h200 and bool(settings.bf16) and settings.num_micro_batches >= _MICRO_BATCHES
    mesh, base = results.get("mesh"), results.get("base")
    wide = (settings.hidden_size or 0) >= _WIDTH_6B9
    in_fp8 = _speed_of_fp8(results) if wide else None
    share = mesh.rates(settings.tokens_per_step)["share_of_peak"] if mesh and _is_large(settings) else None
    rows: list[tuple[str, Literal["at most", "at least"], float, float | None]] = [
        ("mesh / base, time of a step", "at most", 1.01, _time(mesh, base)),
        ("mesh / base, peak memory", "at most", 1.02, _memory(mesh, base)),
        ("mesh / plain, tokens/s", "at least", 0.99, _time(results.get(PLAIN), mesh)),
        ("mesh, share of the bf16 peak at the 1.4B shape and above", "at least", 0.50, share),
        ("FP8 / bf16, tokens/s at the width of 6.9B", "at least", 1.25, in_fp8),
        ("mesh / eager loop, tokens/s", "at least", 1.5, _time(results.get(EAGER), mesh)),
    ]
    return [StepTarget(*row, applies=applies) for row in rows]


def _time(above: VariantResult | None, below: VariantResult | None) -> float | None:
    """Divide step times, which is the inverse ratio of tokens/s."""
    return ratio(above, below).median if above and below else None


def _memory(above: VariantResult | None, below: VariantResult | None) -> float | None:
    if not above or not below or above.peak_bytes is None or below.peak_bytes is None:
        return None
    return above.peak_bytes / below.peak_bytes


def _speed_of_fp8(results: Mapping[str, VariantResult]) -> float | None:
    """Speed-up from FP8 for mesh if it ran in both precisions, otherwise for base."""
    pairs = ((results.get(name), results.get(name + FP8)) for name in ("mesh", "base"))
    return next((_time(bf16, fp8) for bf16, fp8 in pairs if bf16 and fp8), None)


def _is_large(settings: StepSettings) -> bool:
    assert settings.layers is not None and settings.hidden_size is not None
    depth = parse_layers(settings.layers).depth
    return settings.hidden_size > _WIDTH_1B4 or (settings.hidden_size == _WIDTH_1B4 and depth >= _DEPTH_1B4)


def check_output_file(output: Path) -> None:
    """Check that ``--output`` can be written, before a long measurement. The file stays as it is.

    Raises:
        UserError: it cannot be written.
    """
    existed = output.exists()
    try:
        output.open("a").close()
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be written ({error.strerror}); name a file in an existing directory"
        ) from None
    if not existed:
        output.unlink()


def report_as_json(report: StepReport) -> dict[str, Any]:
    """Convert the report for JSON: summaries, and the seconds of every step."""
    settings = asdict(report.settings)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device.describe(),
        "gpus": device.gpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "parts": dict(report.parts),
        "settings": {name: value for name, value in settings.items() if name not in ("output", "profile")},
        "tokens_per_step": report.settings.tokens_per_step,
        "variants": {
            name: _variant(result, report.settings.tokens_per_step) for name, result in report.results.items()
        },
        "skipped": dict(report.skipped),
        "ratios": {
            pair: {part: asdict(spread) for part, spread in parts.items()}
            for pair, parts in ratios(report.results).items()
        },
        "targets": [asdict(target) | {"verdict": target.verdict} for target in targets(report)],
    }


def _variant(result: VariantResult, tokens_per_step: int) -> dict[str, Any]:
    return {
        "parameters": result.parameters,
        "flops_per_token": result.flops_per_token,
        "kept_for_backward": asdict(result.saved) if result.saved else None,
        "peak_memory_bytes": result.peak_bytes,
        "allocation_retries": result.retries,
        "peak_flops": result.peak_flops,
        **result.rates(tokens_per_step),
        **{part: asdict(Spread.of(getattr(result.times, part))) for part in PARTS},
        "seconds": asdict(result.times),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, **device.libraries()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "megatron-mesh": megatron_mesh.__version__}
