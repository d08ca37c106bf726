"""Turn errors at the entry point into messages and exit statuses.

End quietly when the reader of the output stops reading, as in ``| head``.
"""

import argparse
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_mesh.config.settings import read_yaml
from megatron_mesh.errors import OutOfMemory, RanksLost, UserError
from megatron_mesh.runtime import exits
from megatron_mesh.runtime.environment import (
    check_rank,
    local_rank_from_environment,
    rank_from_environment,
    world_size_from_environment,
)
from megatron_mesh.runtime.failures import FAILED, RUNNING, Failures, describe_rank, resumes

SECONDS_ALONE = 10.0
"""How long a rank with an error looks for the others before it prints the error by itself."""


@contextmanager
def report_errors(argv: Sequence[str]) -> Iterator[None]:
    """End the program with the right exit status, and with one message per cause for the whole job.

    In a job of several processes, the other ranks learn of an error even before torch.distributed has
    started, and end too. Unexpected exceptions keep their traceback.

    Args:
        argv: the command line, which names the directory for ``run_status.txt`` (``failures.py``).
    """
    try:
        yield
    except UserError as error:
        sys.exit(_report(argv, str(error), FAILED, exits.BAD_INPUT))
    except (OutOfMemory, RanksLost) as error:
        sys.exit(_report(argv, str(error), RUNNING, exits.CRASHED))
    except Exception as error:
        cause = "".join(traceback.format_exception_only(error)).strip()
        if world_size_from_environment() == 1:
            failures_from(argv).note(RUNNING, cause)
            raise
        sys.exit(_report(argv, cause, RUNNING, exits.CRASHED, traceback.format_exc()))


def _report(argv: Sequence[str], cause: str, word: str, status: int, details: str = "") -> int:
    try:
        check_rank()
        rank, world_size = rank_from_environment(), world_size_from_environment()
    except UserError:  # this is the error to report
        rank, world_size = 0, 1
    if world_size == 1:
        print(f"error: {cause}", file=sys.stderr)
        failures_from(argv).note(word, cause)
        return status
    who, reported = describe_rank(rank, world_size), False
    alone = failures_from(argv)
    # If the others do not come, print the reason without them. One rank of each host is enough.
    early = threading.Timer(SECONDS_ALONE, alone.report, (who, cause, word, details))
    if local_rank_from_environment() == 0:
        early.start()
    # The launcher may end this process while it looks for the others. Then still print the reason.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(status))
    try:
        # torch takes seconds to import, and a single process does not need it.
        from megatron_mesh.runtime.rendezvous import meet_to_fail

        meeting = meet_to_fail(rank, world_size)
        early.cancel()
        if meeting is not None:
            reported = True
            failures = failures_from(argv, meeting.store)
            if alone.has_reported(cause):
                failures.silence(cause)
            return meeting.fail(failures, who, cause, word, status, details)
    except ImportError:  # without torch, the other ranks cannot be reached
        pass
    finally:
        early.cancel()
        if not reported and not alone.has_reported(cause):
            alone.report(who, cause, word, details)
    return status


def failures_from(argv: Sequence[str], store: Any = None) -> Failures:
    """Find out from a command line or its YAML file (--save) where to report failures. Never fails."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--save")
    parser.add_argument("--load")
    parser.add_argument("--finetune", action=argparse.BooleanOptionalAction)
    parser.add_argument("--config", type=Path)
    try:
        given = vars(parser.parse_known_args(argv)[0])
        config = given.pop("config")
        settings = {**(_read(config) if config else {}), **{k: v for k, v in given.items() if v is not None}}
    except (argparse.ArgumentError, SystemExit):
        return Failures(store)
    save, load = (settings.get(name) for name in ("save", "load"))
    return Failures(store, save, resumes(save, load, bool(settings.get("finetune"))))


def _read(config: Path) -> dict[str, Any]:
    try:
        return read_yaml(config)
    except UserError:
        return {}


CLOSED = 141
"""Exit status if the program was still printing; the same as after SIGPIPE."""


@contextmanager
def closed_pipe_is_no_error() -> Iterator[None]:
    """End the program without a traceback when nobody reads its output any more.

    If the work is already finished, the exit status stays. A training run doesn't end because of this.
    """
    try:
        yield
    except BrokenPipeError:
        if not _nobody_reads():  # the error came from another pipe
            raise
        sys.exit(CLOSED)
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            # The interpreter flushes the buffer when it ends, so give it a place to write to.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _nobody_reads() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
