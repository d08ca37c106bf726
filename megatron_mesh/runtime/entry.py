"""The end of a program that cannot go on: what it says, where, and its exit status."""

import argparse
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_mesh.config.sources import read_yaml
from megatron_mesh.errors import OutOfMemory, RanksLost, UserError
from megatron_mesh.runtime import exits
from megatron_mesh.runtime.environment import rank_from_environment, world_size_from_environment
from megatron_mesh.runtime.failures import FAILED, RUNNING, Failures, place


@contextmanager
def failures_told(argv: Sequence[str]) -> Iterator[None]:
    """End the program with one message per cause, whichever rank has the error, and the right exit status.

    In a job of several processes an error before torch.distributed has started is told to the other ranks,
    which then end too. Bugs keep their traceback.

    Args:
        argv: the command line, which names the directory of ``run_status.txt`` (see ``failures.py``).
    """
    try:
        yield
    except UserError as error:
        sys.exit(_tell(argv, str(error), FAILED, exits.BAD_INPUT))
    except (OutOfMemory, RanksLost) as error:
        sys.exit(_tell(argv, str(error), RUNNING, exits.CRASHED))
    except Exception as error:
        cause = "".join(traceback.format_exception_only(error)).strip()
        if world_size_from_environment() == 1:
            Failures(None, save_directory(argv)).note(RUNNING, cause)
            raise
        sys.exit(_tell(argv, cause, RUNNING, exits.CRASHED, traceback.format_exc()))


def _tell(argv: Sequence[str], cause: str, word: str, status: int, details: str = "") -> int:
    save, rank, world_size = save_directory(argv), rank_from_environment(), world_size_from_environment()
    if world_size == 1:
        print(f"error: {cause}", file=sys.stderr)
        Failures(None, save).note(word, cause)
        return status
    who, told = place(rank, world_size), False
    # The launcher may end this process while it looks for the others; it has to say why all the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(status))
    try:
        # torch takes seconds to import, and one process alone does not need it.
        from megatron_mesh.runtime.meeting import meet_to_fail

        meeting = meet_to_fail(rank, world_size)
        if meeting is not None:
            told = True
            return meeting.fail(Failures(meeting.store, save), who, cause, word, status, details)
    except ImportError:  # torch cannot be imported: the others cannot be told
        pass
    finally:
        if not told:
            Failures(None, save).tell(who, cause, word, details)
    return status


def save_directory(argv: Sequence[str]) -> str | None:
    """The value of --save on a command line, or in its YAML file. Never fails."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--save")
    parser.add_argument("--config", type=Path)
    try:
        known = parser.parse_known_args(argv)[0]
        return known.save or (read_yaml(known.config).get("save") if known.config else None)
    except (UserError, argparse.ArgumentError, SystemExit):
        return None
