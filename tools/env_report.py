#!/usr/bin/env python
"""Print what this machine offers for training: GPUs, libraries, and the cost of each missing part.

    python tools/env_report.py
    srun --label --nodes 4 --ntasks-per-node 1 --gpus-per-node 8 python tools/env_report.py   # every node

The exit status is 1 if a required package is missing or torch cannot be imported.
"""

import sys
from dataclasses import dataclass

from megatron_mesh import command


@dataclass
class Options:
    """There are none."""


def main(options: Options) -> None:
    """Print the report."""
    from megatron_mesh.environment_report import NO_TORCH, missing_required, report

    rows = report()
    widths = [max(len(getattr(row, name)) for row in rows) for name in ("what", "found")]
    for row in rows:
        print(f"{row.what:<{widths[0]}}  {row.found:<{widths[1]}}  {row.note}".rstrip())
    if missing := missing_required():
        sys.exit(f"error: {', '.join(missing)} missing; install what is needed with pip install -e .")
    if NO_TORCH:
        sys.exit(f"error: {NO_TORCH}; install a torch that fits this machine's driver and CUDA")


if __name__ == "__main__":
    command.run(main)
