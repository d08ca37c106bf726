#!/usr/bin/env python
"""Plot a run's loss, and where its routers write and read.

    python tools/plot_run.py --run runs/quickstart/model

Writes loss.png and, for a run with MeSH routers, routers.png next to the run's metrics.jsonl. Existing
figures are replaced. The run may still be training.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_mesh import command


@dataclass
class Options:
    """Options of the figures."""

    run: Path
    """The run's directory, with its metrics.jsonl."""
    output_dir: Path | None = None
    """Directory for the figures. (default: the run's)"""


def main(options: Options) -> None:
    """Write the figures."""
    from megatron_mesh.metrics.figures import draw_run

    for path in draw_run(options.run, options.output_dir or options.run):
        print(f"wrote {path}")


if __name__ == "__main__":
    command.run(main)
