#!/usr/bin/env python
"""Step times of recurrence schemes beside a plain Megatron-core GPT of the same depth.

python tools/benchmark.py --variants plain base mesh --steps 20 --output results.json

All models live in one process and take turns, a step each; the tables show medians and quartiles, with
forward-backward and optimizer apart, and what each model keeps for its backward pass.
"""

import json
import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from megatron_mesh.bench.settings import Settings
from megatron_mesh.errors import UserError


def main(argv: Sequence[str]) -> None:
    """Measure as the command line says, print the tables and write the JSON file."""
    settings = tyro.cli(Settings, prog="benchmark.py", description=__doc__, args=argv)
    # Megatron-core takes seconds to import, and --help does not need it.
    from megatron_mesh.bench.report import as_json, as_tables
    from megatron_mesh.bench.run import run

    results = run(settings)
    Console().print(as_tables(settings, results))
    if settings.output is not None:
        settings.output.write_text(json.dumps(as_json(settings, results), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {settings.output}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
