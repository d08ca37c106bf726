"""Compare the memory bandwidth of the Triton kernels and of torch's operations with a plain copy on a GPU.

    python -m tools.bench.kernel --hidden-size 2048 --terms 2 3 4 --output kernel.json

Both compute the weighted sum of the recurrence's memory, forward and backward. GB/s counts the least possible
bytes: J + 1 states forward, 2 J + 1 backward, and the weights. Every round also times a copy of 1 GiB, and
shares are of that round's copy. The defaults are the 1.4B shape.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from megatron_mesh import command, kernels
from megatron_mesh.config.settings import at_least
from megatron_mesh.errors import UserError
from megatron_mesh.recurrence import mixing
from megatron_mesh.recurrence.memory import Mix
from megatron_mesh.runtime import device, strict_json
from tools.bench.measure import now
from tools.bench.report import Spread, check_output_file

COPY_BYTES = 2**30
COPY = ("copy", "")
DIRECTIONS = ("forward", "backward")

Seconds = Mapping[tuple[str, str], Sequence[float]]
"""Seconds per call in each round, by (implementation or "copy", direction)."""


@dataclass(frozen=True)
class Options:
    """Sizes and repetitions."""

    seq_length: int = 4096
    """Tokens per sequence S."""
    micro_batch_size: int = 8
    """Sequences B."""
    hidden_size: int = 2048
    """Hidden size H."""
    rounds: int = 30
    """Timings of each implementation."""
    calls: int = 10
    """Calls per timing."""
    terms: tuple[int, ...] = (2, 3, 4)
    """Numbers of states J to sum; a model with K loops sums 2 to K + 2."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Data type of the states."""
    output: Path | None = None
    """Write all measurements to this JSON file."""


def main(options: Options) -> None:
    """Measure, print a table and write the JSON file."""
    at_least(1, options, "seq_length", "micro_batch_size", "hidden_size", "rounds", "calls")
    if not options.terms or min(options.terms) < 1:
        raise UserError("--terms needs one or more numbers of at least 1, e.g. 2 3 4")
    if options.output is not None:
        check_output_file(options.output)
    if reason := kernels.why_unavailable():
        raise UserError(f"the kernels cannot run: {reason}; use a machine with a GPU and triton")
    torch.manual_seed(0)
    sizes = (options.seq_length, options.micro_batch_size, options.hidden_size)
    ways = {"kernel": kernels.weighted_sum, "torch": mixing.weighted_sum}
    results: dict[int, list[KernelResult]] = {}
    for terms in track(options.terms, "J", console=Console(stderr=True)):
        shape = MixShape(*sizes, terms, getattr(torch, options.dtype))
        seconds = measure_kernels(
            shape, ways, rounds=options.rounds, calls=options.calls, copy_bytes=COPY_BYTES
        )
        results[terms] = summarize(shape, seconds, COPY_BYTES)
    print(f"{device.describe()}; [S, B, H] = {list(sizes)}, {options.dtype}; median (quartiles)")
    print(f"{'J':>2}  {'direction':<9} {'way':<7} {'least MB':>8}  {'ms':<22} {'GB/s':>6}  share of a copy")
    for terms, found in results.items():
        for row in found:
            print(
                f"{terms:>2}  {row.direction:<9} {row.implementation:<7} {row.least_bytes / 1e6:>8.1f}  "
                f"{row.milliseconds!s:<22} {row.gigabytes_per_second.median:>6.0f}  {row.share_of_copy}"
            )
    if options.output is not None:
        _write(options.output, options, results)


def _write(output: Path, options: Options, results: dict[int, list["KernelResult"]]) -> None:
    import triton

    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device.describe(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "settings": {name: value for name, value in vars(options).items() if name != "output"},
        "results": {terms: [asdict(row) for row in found] for terms, found in results.items()},
    }
    output.write_text(strict_json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {output}")


@dataclass(frozen=True)
class MixShape:
    """Sizes of a weighted sum of J states [S, B, H] with float32 weights [S, B, J]."""

    sequence: int
    batch: int
    hidden: int
    terms: int
    dtype: torch.dtype

    def least_bytes(self, direction: str) -> int:
        """Bytes to move if every input is read once and every output is written once."""
        states = {"forward": self.terms + 1, "backward": 2 * self.terms + 1}[direction]
        weights = {"forward": self.terms, "backward": 2 * self.terms}[direction]
        tokens = self.sequence * self.batch
        return tokens * (states * self.hidden * self.dtype.itemsize + weights * 4)


@dataclass(frozen=True)
class KernelResult:
    """Results of one implementation in one direction; spreads are over the rounds."""

    direction: str
    implementation: str
    least_bytes: int
    milliseconds: Spread
    gigabytes_per_second: Spread
    """The least possible bytes divided by the time."""
    share_of_copy: Spread
    """That speed divided by the speed of a copy in the same round."""


def measure_kernels(
    shape: MixShape, implementations: Mapping[str, Mix], *, rounds: int, calls: int, copy_bytes: int
) -> Seconds:
    """Time each implementation and a copy in turn. Each round has a new random order.

    Args:
        calls: calls launched together in one timing, which hides the time to launch them.
        copy_bytes: size of the copied tensor (read once, written once).
    """
    work = dict(_work(shape, implementations))
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device.device()).random_()
    target = torch.empty_like(source)
    work[COPY] = lambda: target.copy_(source)
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in work}
    order = random.Random(0)
    for index in range(rounds + 1):
        for name in order.sample(list(work), len(work)):
            measured = _seconds(work[name], calls)
            if index:  # the first round compiles and allocates
                seconds[name].append(measured)
    return seconds


def summarize(shape: MixShape, seconds: Seconds, copy_bytes: int) -> list[KernelResult]:
    """Summarize the timings, forward first."""
    copied = [2 * copy_bytes / each for each in seconds[COPY]]
    found = []
    ways = [name for name in seconds if name != COPY]
    for name, direction in sorted(ways, key=lambda way: DIRECTIONS.index(way[1])):
        least, times = shape.least_bytes(direction), seconds[name, direction]
        speeds = [least / each for each in times]
        shares = [speed / copy for speed, copy in zip(speeds, copied, strict=True)]
        found.append(
            KernelResult(
                direction,
                name,
                least,
                Spread.of([each * 1e3 for each in times]),
                Spread.of([speed / 1e9 for speed in speeds]),
                Spread.of(shares),
            )
        )
    return found


def _work(
    shape: MixShape, implementations: Mapping[str, Mix]
) -> Iterator[tuple[tuple[str, str], Callable[[], object]]]:
    tokens, where = (shape.sequence, shape.batch), device.device()
    weights = torch.randn(*tokens, shape.terms, device=where, requires_grad=True)
    states = [
        torch.randn(*tokens, shape.hidden, device=where).to(shape.dtype).requires_grad_()
        for _ in range(shape.terms)
    ]
    grad = torch.randn(*tokens, shape.hidden, device=where).to(shape.dtype)

    def forward(mix: Mix) -> Tensor:
        with torch.no_grad():
            return mix(weights, states)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, [weights, *states], grad, retain_graph=True)

    for name, mix in implementations.items():
        out = mix(weights, states)
        yield (name, "forward"), partial(forward, mix)
        yield (name, "backward"), partial(backward, out)


def _seconds(work: Callable[[], object], calls: int) -> float:
    start = now()
    for _ in range(calls):
        work()
    return (now() - start) / calls


if __name__ == "__main__":
    command.run(main)
