"""``run_in_fork`` reports errors and the death of its process, which ends together with its parent."""

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


def test_the_death_of_the_process_is_an_error() -> None:
    """For example by the kernel, when memory runs out."""
    with pytest.raises(RuntimeError, match=r"ended early .SIGKILL.; check whether"):
        run_in_fork(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_the_process_ends_with_its_parent() -> None:
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
