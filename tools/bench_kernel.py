#!/usr/bin/env python
"""The memory's weighted sum on a GPU: GB/s of the Triton kernels and of torch's operations, beside a copy.

python tools/bench_kernel.py --hidden-size 2048 --terms 2 3 4 --output kernel.json

GB/s counts the least possible bytes: forward J + 1 states, backward 2 J + 1, and the weights. A copy of 1 GiB
is timed in every round, and shares are of that round's copy. The default is the 1.4B shape.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_mesh.bench.output import check_writable
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import strict_json
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error

COPY_BYTES = 2**30


def main(argv: Sequence[str]) -> None:
    """Measure, print a table, write the JSON file."""
    arguments = _parser().parse_args(argv)
    sizes = (arguments.seq_length, arguments.micro_batch_size, arguments.hidden_size)
    if min(*sizes, *arguments.terms, arguments.rounds, arguments.calls) < 1:
        raise UserError("sizes, --terms, --rounds and --calls must be at least 1")
    if arguments.output is not None:
        check_writable(arguments.output)
    # These take seconds to import, and --help and mistakes do not need them.
    import torch
    from rich.console import Console
    from rich.progress import track

    from megatron_mesh import kernels
    from megatron_mesh.bench.kernel import Shape, measure, rows
    from megatron_mesh.recurrence import mixing
    from megatron_mesh.runtime import device

    if reason := kernels.why_unavailable():
        raise UserError(f"the kernels cannot run: {reason}. Run this on a machine with a GPU and triton.")
    torch.manual_seed(0)
    ways = {"kernel": kernels.weighted_sum, "torch": mixing.weighted_sum}
    results: dict[int, list[Any]] = {}
    for terms in track(arguments.terms, "J", console=Console(stderr=True)):
        shape = Shape(*sizes, terms, getattr(torch, arguments.dtype))
        seconds = measure(shape, ways, rounds=arguments.rounds, calls=arguments.calls, copy_bytes=COPY_BYTES)
        results[terms] = rows(shape, seconds, COPY_BYTES)
    print(f"{device.describe()}; [S, B, H] = {list(sizes)}, {arguments.dtype}; median (quartiles)")
    print(f"{'J':>2}  {'direction':<9} {'way':<7} {'least MB':>8}  {'ms':<22} {'GB/s':>6}  share of a copy")
    for terms, found in results.items():
        for row in found:
            print(
                f"{terms:>2}  {row.direction:<9} {row.implementation:<7} {row.least_bytes / 1e6:>8.1f}  "
                f"{row.milliseconds!s:<22} {row.gigabytes_per_second.median:>6.0f}  {row.share_of_copy}"
            )
    if arguments.output is not None:
        _write(arguments, results)


def _write(arguments: argparse.Namespace, results: dict[int, list[Any]]) -> None:
    import torch
    import triton

    from megatron_mesh.runtime import device

    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device.describe(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "settings": {name: value for name, value in vars(arguments).items() if name != "output"},
        "results": {terms: [asdict(row) for row in found] for terms, found in results.items()},
    }
    arguments.output.write_text(strict_json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {arguments.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_kernel.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for name, value, text in (
        ("seq-length", 4096, "S"),
        ("micro-batch-size", 8, "B"),
        ("hidden-size", 2048, "H"),
        ("rounds", 30, "timings of each way"),
        ("calls", 10, "calls in one timing"),
    ):
        add(f"--{name}", type=int, default=value, help=f"{text} (default: %(default)s)")
    add("--terms", type=int, nargs="+", default=[2, 3, 4], help="J: 2..K + 2 (default: 2 3 4)")
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="(default: bfloat16)")
    add("--output", type=Path, help="write everything measured to this JSON file")
    return parser


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
