#!/usr/bin/env python
"""Pretrain a recursive transformer.

``--help`` lists the settings.

python pretrain_mesh.py --config examples/configs/pythia-160m.yaml --data-path my_corpus_text_document
torchrun --nproc-per-node 8 pretrain_mesh.py --config examples/configs/pythia-1b.yaml --data-path D
"""

import io
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout

from megatron_mesh import compat
from megatron_mesh.arguments import Arguments, parse_args
from megatron_mesh.config.resolve import resolve
from megatron_mesh.errors import UserError
from megatron_mesh.metrics.console import show_messages
from megatron_mesh.runtime import exits
from megatron_mesh.runtime.entry import closed_pipe_is_no_error, report_errors
from megatron_mesh.runtime.environment import (
    check_rank,
    rank_from_environment,
    world_size_from_environment,
)
from megatron_mesh.runtime.phases import log_start_times


def main(argv: Sequence[str]) -> int:
    """Parse the command line, then plan (``--dry-run``) or train; return an exit status of ``exits.py``."""
    world_size = world_size_from_environment()
    arguments = parse_args(argv) if world_size == 1 else _parse_quietly(argv)
    config = resolve(arguments.config, world_size=world_size)
    # Imported late: Megatron-core takes seconds to import, and --help and input errors don't need it.
    if arguments.dry_run:
        from megatron_mesh.planner.text import dry_run_text

        if rank_from_environment() == 0:
            print(dry_run_text(config, world_size))
        return exits.DONE
    compat.check_versions()
    from megatron_mesh.train import pretrain

    return pretrain(config)


def _parse_quietly(argv: Sequence[str]) -> Arguments:
    """Parse the command line on one of many ranks. Only rank 0 prints help; an error becomes a UserError."""
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            return parse_args(argv)
    except SystemExit as end:
        if end.code:
            raise UserError("\n".join(map(str.rstrip, stderr.getvalue().strip().splitlines()))) from None
        if rank_from_environment() == 0:
            print(stdout.getvalue(), end="")
        raise


if __name__ == "__main__":  # loader processes may import this file
    # Until training starts there is nothing to save, so Ctrl-C just ends the process. A KeyboardInterrupt
    # would print a traceback of some import. Some libraries even catch it and continue half imported.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with closed_pipe_is_no_error(), report_errors(sys.argv[1:]):
        check_rank()
        show_messages(rank_from_environment() == 0)
        log_start_times()
        compat.install()
        sys.exit(main(sys.argv[1:]))
