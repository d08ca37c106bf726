"""End quietly when the reader of the output stops reading, as in ``| head``."""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
