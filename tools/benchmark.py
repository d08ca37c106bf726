#!/usr/bin/env python
"""Training steps of recurrence schemes beside a plain Megatron-core GPT and a loop of Hugging Face layers.

python tools/benchmark.py --shape 1.4b --output results.json
python tools/benchmark.py --variants base base-compiled mesh mesh-compiled --profile traces

All models live in one process and take turns, a step each; the tables show speed, memory, the parts of a step
and what each model keeps for its backward pass, as medians and quartiles, and the project's targets.
"""

import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from megatron_mesh.bench.settings import Settings
from megatron_mesh.errors import OutOfMemory, UserError
from megatron_mesh.runtime import exits, strict_json
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error


def main(argv: Sequence[str]) -> None:
    """Measure as the command line says, print the tables and write the files."""
    settings = tyro.cli(Settings, prog="benchmark.py", description=__doc__, args=argv)
    # Megatron-core takes seconds to import, and --help does not need it.
    from megatron_mesh.bench.report import as_json
    from megatron_mesh.bench.run import run
    from megatron_mesh.bench.tables import as_markdown, as_tables
    from megatron_mesh.runtime.console import show_messages

    show_messages(speaks=True)
    report = run(settings)
    Console().print(as_tables(report))
    if settings.output is not None:
        settings.output.write_text(strict_json.dumps(as_json(report), indent=1) + "\n", encoding="utf-8")
        tables = settings.output.with_suffix(".md")
        tables.write_text(as_markdown(report), encoding="utf-8")
        print(f"wrote {settings.output} and {tables}")


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exits.BAD_INPUT)
    except OutOfMemory as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exits.CRASHED)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
