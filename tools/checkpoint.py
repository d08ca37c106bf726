#!/usr/bin/env python
"""Look at checkpoints, check them, and rewrite them: without a GPU, in one process.

python tools/checkpoint.py list runs/160m-mesh
python tools/checkpoint.py verify runs/160m-mesh/iter_0010000
python tools/checkpoint.py show runs/160m-mesh/iter_0010000
python tools/checkpoint.py reshard runs/160m-mesh/iter_0010000 --save weights --weights-only

Any layout of ranks loads any checkpoint, so resharding is never needed to train on; it makes few files of
the many that a large job wrote, or a checkpoint of the weights alone.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mesh.errors import UserError
from megatron_mesh.runtime.console import show_messages
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error


def main(argv: Sequence[str]) -> int:
    """Do what the command line says; 1 if ``verify`` found damage."""
    arguments = _parser().parse_args(argv)
    # Megatron-core takes seconds to import, and --help and mistakes do not need it.
    from megatron_mesh.checkpoint import inspect

    try:
        return _do(arguments, inspect)
    except PermissionError as error:
        raise UserError(
            f"{error.filename} may not be read ({error.strerror}); give yourself access"
        ) from None


def _do(arguments: argparse.Namespace, inspect: Any) -> int:
    if arguments.command == "list":
        print(inspect.table(arguments.directory))
    elif arguments.command == "show":
        print(inspect.description(arguments.checkpoint))
    elif arguments.command == "verify":
        return inspect.verify(arguments.checkpoint)
    else:
        inspect.reshard(arguments.checkpoint, arguments.save, weights_only=arguments.weights_only)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="checkpoint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("list", help="the checkpoints in a --save directory")
    command.add_argument("directory", type=Path)
    for name, text in {
        "verify": "compare every file with its checksum",
        "show": "step, sizes, versions and configuration",
        "reshard": "write the same state anew, from one process",
    }.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("checkpoint", type=Path, help="an iter_... directory, or a run's: its newest")
    command.add_argument("--save", type=Path, required=True, help="directory for the new checkpoint")
    command.add_argument("--weights-only", action="store_true", help="leave out the optimizer's state")
    return parser


if __name__ == "__main__":
    show_messages(True)
    try:
        with closed_pipe_is_no_error():
            sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
