"""Run a function in a separate process, so that the threads of this one keep running.

C++ code that holds Python's global interpreter lock (GIL) for minutes stops every other thread: the one that
raises the owner's counter in ``--save`` (``ownership.py``), the watchdog, the listener, and signal handlers.
"""

import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

_PR_SET_PDEATHSIG = 1


def run_in_fork(work: Callable[[], None]) -> None:
    """Call ``work`` in a fork of this process and wait for it.

    A fork starts at once and needs no pickling. ``work`` must not use torch or CUDA, and writes its result to
    files. The fork dies with this process. Otherwise it would keep sockets open, and the other ranks would
    not notice that this process has died.

    Raises:
        RuntimeError: the fork was killed, for example because the host ran out of memory.
        Exception: what ``work`` raised.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, there, os.getpid()), daemon=True)
    process.start()
    there.close()
    try:
        error = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"a helper process ended early ({_ending(process.exitcode)}); check whether the host ran out of "
            "memory"
        ) from None
    finally:
        process.kill()  # it has ended already, unless this process was interrupted while waiting
        process.join()
        here.close()
    if error is not None:
        raise error


def _run(work: Callable[[], None], answer: Connection, parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the parent ends this one
    signal.set_wakeup_fd(-1)
    if os.getppid() != parent:
        return
    try:
        work()
    except Exception as error:
        error.add_note(f"In a helper process:\n{traceback.format_exc()}")
        answer.send(error)
    else:
        answer.send(None)


def _ending(status: int | None) -> str:
    return signal.Signals(-status).name if status is not None and status < 0 else f"exit status {status}"
