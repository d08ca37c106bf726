"""What the project wants to reach on one H200 in bf16, and what a report says of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_mesh.bench.report import Report, Result, quotient
from megatron_mesh.bench.settings import Settings
from megatron_mesh.bench.shapes import EAGER, FP8, PLAIN
from megatron_mesh.config.layers import parse_layers
from megatron_mesh.runtime import device

_WIDTH_1B4, _DEPTH_1B4 = 2048, 24
_WIDTH_6B9 = 4096
_MICRO_BATCHES = 8


@dataclass(frozen=True)
class Target:
    """A figure, and where it should be."""

    what: str
    bound: Literal["at most", "at least"]
    limit: float
    measured: float | None
    """None where the report has no such figure."""
    applies: bool
    """Whether it was measured where the target is meant: on an H200, in bf16, with micro-batches enough."""

    @property
    def verdict(self) -> str:
        """In the words of the table."""
        if self.measured is None or not self.applies:
            return "not measured here"
        met = self.measured <= self.limit if self.bound == "at most" else self.measured >= self.limit
        return "met" if met else "missed"


def targets(report: Report) -> list[Target]:
    """Every target, measured or not."""
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
    return [Target(*row, applies=applies) for row in rows]


def _time(above: Result | None, below: Result | None) -> float | None:
    """Step time of one over the other: the inverse of their tokens/s."""
    return quotient(above, below).median if above and below else None


def _memory(above: Result | None, below: Result | None) -> float | None:
    if not above or not below or above.peak_bytes is None or below.peak_bytes is None:
        return None
    return above.peak_bytes / below.peak_bytes


def _speed_of_fp8(results: Mapping[str, Result]) -> float | None:
    """Of mesh if it ran in both precisions, else of base."""
    pairs = ((results.get(name), results.get(name + FP8)) for name in ("mesh", "base"))
    return next((_time(bf16, fp8) for bf16, fp8 in pairs if bf16 and fp8), None)


def _is_large(settings: Settings) -> bool:
    assert settings.layers is not None and settings.hidden_size is not None
    depth = parse_layers(settings.layers).depth
    return settings.hidden_size > _WIDTH_1B4 or (settings.hidden_size == _WIDTH_1B4 and depth >= _DEPTH_1B4)
