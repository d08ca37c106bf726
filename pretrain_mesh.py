#!/usr/bin/env python
"""Pretrain a recursive transformer; ``--help`` lists the settings.

python pretrain_mesh.py --config examples/configs/pythia-160m-mesh.yaml --data-path my_corpus_text_document
torchrun --nproc-per-node 8 pretrain_mesh.py --config examples/configs/pythia-1b-mesh.yaml --data-path D
"""

import sys
import time
from collections.abc import Sequence

from megatron_mesh.arguments import parse_args
from megatron_mesh.config.checks import resolve
from megatron_mesh.errors import OutOfMemory, UserError
from megatron_mesh.runtime import exits
from megatron_mesh.runtime.console import show_messages
from megatron_mesh.runtime.environment import rank_from_environment, world_size_from_environment


def main(argv: Sequence[str]) -> int:
    """Parse, then plan or train; returns the exit status (``megatron_mesh/runtime/exits.py``)."""
    arguments = parse_args(argv)
    world_size = world_size_from_environment()
    config = resolve(arguments.config, world_size=world_size)
    # Megatron-core takes seconds to import, and --help and mistakes do not need it.
    if arguments.dry_run:
        from megatron_mesh.planner.dry_run import dry_run_text

        print(dry_run_text(config, world_size))
        return exits.DONE
    from megatron_mesh.train import pretrain

    return pretrain(config)


if __name__ == "__main__":  # saving a checkpoint starts processes that import this file
    speaks = rank_from_environment() == 0
    show_messages(speaks)
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        if speaks:
            print(f"error: {error}", file=sys.stderr)
        else:  # where one rank ends the launcher ends the others, and the first has to say why
            time.sleep(3)
        sys.exit(exits.BAD_INPUT)
    except OutOfMemory as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exits.CRASHED)
