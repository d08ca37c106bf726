"""Programs whose output goes to one that stops reading, such as ``| head``."""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

CLOSED = 141
"""Exit status of a program that was still printing: that of one which SIGPIPE ends."""


@contextmanager
def closed_pipe_is_no_error() -> Iterator[None]:
    """End the program without a traceback if nobody reads its output any more.

    If the work was already finished, the exit status stays. A training run doesn't end because of this.
    """
    try:
        yield
    except BrokenPipeError:
        if not _nobody_reads():  # it was another pipe
            raise
        sys.exit(CLOSED)
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            # What is still in the buffer has to go somewhere when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _nobody_reads() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
