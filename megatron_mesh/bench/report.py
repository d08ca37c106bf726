"""From the times of single steps to medians, rates and quotients, and all of it as JSON."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import combinations
from statistics import quantiles
from typing import Any

import torch

import megatron_mesh
from megatron_mesh.bench.kept import Kept
from megatron_mesh.bench.settings import Settings
from megatron_mesh.bench.timing import Times
from megatron_mesh.runtime import device

PARTS = ("forward_backward", "communication", "optimizer", "step")
COMPARED = ("forward_backward", "optimizer", "step")
"""Parts of which there are quotients; in one process, communication is next to nothing."""
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
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.lower:.3f}-{self.upper:.3f})"


@dataclass(frozen=True)
class Result:
    """Everything measured of one variant."""

    parameters: int
    kept: Kept | None
    """What autograd keeps; counted for Megatron's layers in their plain precision."""
    times: Times
    flops_per_token: float = 0.0
    """Of forward and backward of the unrolled network (``config/sizes.py``)."""
    peak_bytes: int | None = None
    """Most memory held in a measured step; None on a CPU."""
    peak_flops: float | None = None
    """FLOP/s of the device's data sheet in the variant's precision; None where it is not known."""
    retries: int = 0
    """How often the GPU's memory was full in measured steps (``memory.py``)."""

    def rates(self, tokens_per_step: int) -> dict[str, float | None]:
        """Tokens/s, model TFLOP/s and share of the device's peak, by the median step."""
        tokens_per_second = tokens_per_step / Spread.of(self.times.step).median
        flops = self.flops_per_token * tokens_per_second
        return {
            "tokens_per_second": tokens_per_second,
            "model_tflops": flops / 1e12,
            "share_of_peak": flops / self.peak_flops if self.peak_flops else None,
        }


@dataclass(frozen=True)
class Report:
    """A whole benchmark. ``settings`` are complete; ``results`` are in the order of the variants."""

    settings: Settings
    results: Mapping[str, Result]
    skipped: Mapping[str, str]
    """Variants that did not run here, and why."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """What computed the layers, the memory and the optimizer's step of Megatron's variants."""


def ratios(results: Mapping[str, Result]) -> dict[str, dict[str, Spread]]:
    """Each variant over each one before it, ``{"mesh / base": {part: spread}}``.

    The spread is that of the quotients of single rounds: what slows one round down slows down both.
    """
    quotients: dict[str, dict[str, Spread]] = {}
    for below, above in combinations(results, 2):
        parts = quotients[f"{above} / {below}"] = {}
        for part in COMPARED:
            parts[part] = quotient(results[above], results[below], part)
    return quotients


def quotient(above: Result, below: Result, part: str = "step") -> Spread:
    """Time of ``above`` over that of ``below``, round by round."""
    pairs = zip(getattr(above.times, part), getattr(below.times, part), strict=True)
    return Spread.of([a / b for a, b in pairs])


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON has it: summaries, and the seconds of every step."""
    from megatron_mesh.bench.targets import targets

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


def _variant(result: Result, tokens_per_step: int) -> dict[str, Any]:
    return {
        "parameters": result.parameters,
        "flops_per_token": result.flops_per_token,
        "kept_for_backward": asdict(result.kept) if result.kept else None,
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
