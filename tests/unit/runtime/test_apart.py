"""A function in a process of its own: its errors, its death, and that of its parent."""

import multiprocessing
import os
import signal
import time

import pytest

from megatron_mesh.data.cache import run_in_fork
from megatron_mesh.errors import UserError


def test_an_error_arrives_with_its_traceback() -> None:
    def fail() -> None:
        raise UserError("no such file")

    with pytest.raises(UserError) as failure:
        run_in_fork(fail)
    assert str(failure.value) == "no such file" and "in fail" in failure.value.__notes__[0]


def test_a_helper_that_is_killed_is_an_error() -> None:
    """As by the kernel when memory is used up."""
    with pytest.raises(RuntimeError, match=r"ended early .SIGKILL.; check whether"):
        run_in_fork(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_the_helper_ends_with_its_parent() -> None:
    """Otherwise the sockets of a killed rank would stay open, and the others would not notice its death."""
    reading, writing = os.pipe()
    context = multiprocessing.get_context("fork")
    parent = context.Process(target=run_in_fork, args=(lambda: (os.write(writing, b"x"), time.sleep(600)),))
    parent.start()
    os.close(writing)
    assert os.read(reading, 1) == b"x"
    parent.kill()
    parent.join()
    assert os.read(reading, 1) == b""  # nobody has the other end open any more
