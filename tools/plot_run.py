#!/usr/bin/env python
"""Draw a run: its loss, and where its routers write and read.

python tools/plot_run.py --run runs/quickstart/model

writes loss.png and, for a run with MeSH routers, routers.png beside the run's metrics.jsonl. A run that still
trains can be drawn as well; figures that are there are drawn anew.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mesh.errors import UserError
from megatron_mesh.probe.figures import draw_run
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error


def main(argv: Sequence[str]) -> None:
    """Draw as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="directory of the run's metrics.jsonl")
    parser.add_argument("--output-dir", type=Path, help="directory of the figures (default: the run's)")
    arguments = parser.parse_args(argv)
    for path in draw_run(arguments.run, arguments.output_dir or arguments.run):
        print(f"wrote {path}")


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
