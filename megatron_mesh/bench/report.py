"""From the times of single steps to medians and quotients, as a table and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import combinations
from platform import python_version
from statistics import quantiles
from typing import Any

import megatron.core
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

import megatron_mesh
from megatron_mesh.bench.kept import Kept
from megatron_mesh.bench.settings import Settings
from megatron_mesh.bench.timing import Times
from megatron_mesh.runtime import device

PARTS = ("forward_backward", "optimizer", "step")


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
    kept: Kept
    times: Times


def ratios(results: Mapping[str, Result]) -> dict[str, dict[str, Spread]]:
    """Each variant over each one before it, ``{"mesh / base": {part: spread}}``.

    The spread is that of the quotients of single rounds: what slows one round down slows down both.
    """
    quotients: dict[str, dict[str, Spread]] = {}
    for below, above in combinations(results, 2):
        parts = quotients[f"{above} / {below}"] = {}
        for part in PARTS:
            pairs = zip(getattr(results[above].times, part), getattr(results[below].times, part), strict=True)
            parts[part] = Spread.of([a / b for a, b in pairs])
    return quotients


def as_json(settings: Settings, results: Mapping[str, Result]) -> dict[str, Any]:
    """The report as JSON has it: summaries, and the seconds of every step."""
    tokens = settings.num_micro_batches * settings.micro_batch_size * settings.seq_length
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device.describe(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": python_version(),
            "torch": torch.__version__,
            "megatron-core": megatron.core.__version__,
            "megatron-mesh": megatron_mesh.__version__,
        },
        "settings": {name: value for name, value in asdict(settings).items() if name != "output"},
        "tokens_per_step": tokens,
        "variants": {
            name: {
                "parameters": result.parameters,
                "kept_for_backward": asdict(result.kept),
                "tokens_per_second": tokens / Spread.of(result.times.step).median,
                **{part: asdict(Spread.of(getattr(result.times, part))) for part in PARTS},
                "seconds": asdict(result.times),
            }
            for name, result in results.items()
        },
        "ratios": {
            pair: {part: asdict(spread) for part, spread in parts.items()}
            for pair, parts in ratios(results).items()
        },
    }


def as_tables(settings: Settings, results: Mapping[str, Result]) -> Group:
    """The report for a terminal."""
    s = settings
    seconds = Table(
        "variant",
        *(part.replace("_", "-") for part in PARTS),
        title="seconds per step: median (quartiles)",
        box=SIMPLE_HEAD,
        caption=f"{s.layers}, hidden {s.hidden_size}, vocabulary {s.vocab_size:,}; {s.num_micro_batches} "
        f"micro-batches of {s.micro_batch_size} x {s.seq_length} tokens, {'bf16' if s.bf16 else 'fp32'}, "
        f"{s.steps} steps of each in turn; {device.describe()}",
    )
    for name, result in results.items():
        seconds.add_row(name, *(str(Spread.of(getattr(result.times, part))) for part in PARTS))
    quotients = Table(
        "quotient",
        *(part.replace("_", "-") for part in PARTS),
        title="quotients of times of the same round: median (quartiles)",
        box=SIMPLE_HEAD,
    )
    for pair, parts in ratios(results).items():
        quotients.add_row(pair, *(str(parts[part]) for part in PARTS))
    return Group(seconds, quotients, _kept_table(results))


def _kept_table(results: Mapping[str, Result]) -> Table:
    table = Table(
        "variant",
        "parameters",
        "states [S, B, H]",
        "MiB in states",
        "MiB in all",
        title="kept for backward by one micro-batch, parameters aside",
        box=SIMPLE_HEAD,
    )
    for name, result in results.items():
        kept = result.kept
        sizes = (f"{n / 2**20:.3f}" for n in (kept.state_bytes, kept.total_bytes))
        table.add_row(name, f"{result.parameters:,}", str(kept.states), *sizes)
    return table
