#!/usr/bin/env python
"""What this machine has for training: GPUs, libraries, and what each missing part costs.

python tools/env_report.py
srun --label --nodes 4 --ntasks-per-node 1 --gpus-per-node 8 python tools/env_report.py     # of every node

Exit status 1 where a package that is needed is missing, or torch cannot be imported.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_mesh.runtime.pipes import closed_pipe_is_no_error


def main(argv: Sequence[str]) -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(
        prog="env_report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    from megatron_mesh.environment_report import NO_TORCH, missing_required, report

    rows = report()
    widths = [max(len(getattr(row, name)) for row in rows) for name in ("what", "found")]
    for row in rows:
        print(f"{row.what:<{widths[0]}}  {row.found:<{widths[1]}}  {row.note}".rstrip())
    if missing := missing_required():
        sys.exit(f"error: {', '.join(missing)} missing; pip install -e . installs what is needed")
    if NO_TORCH:
        sys.exit(f"error: {NO_TORCH}; install a torch that fits this machine's driver and CUDA")


if __name__ == "__main__":
    with closed_pipe_is_no_error():
        main(sys.argv[1:])
