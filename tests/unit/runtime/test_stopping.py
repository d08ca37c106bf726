"""The second request to stop, which must not wait for anybody."""

import os
import signal
import subprocess
import sys

from megatron_mesh.config.schema import CheckpointConfig
from megatron_mesh.runtime.stopping import StopRequests
from tests.helpers import one_process, tiny_config

# The main thread is inside a call that no signal interrupts, as in a collective operation that hangs.
BLOCKED = """
import ctypes, os, signal, threading, time
from megatron_mesh.config.schema import CheckpointConfig
from megatron_mesh.runtime import stopping

def ask():
    for pause in ({pauses}):
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(1)
    os._exit(0)

stopping.ECHO_SECONDS = 0.5
with stopping.StopRequests(CheckpointConfig(), 0.0).listening():
    threading.Thread(target=ask).start()
    lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)
"""


def test_control_c_is_a_request_like_others(tmp_path) -> None:
    stop = StopRequests(CheckpointConfig(save=str(tmp_path)), 0.0)
    with one_process(tiny_config()), stop.listening():
        assert stop.reason(1) == ""
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason(2) == "SIGINT"


def status(*pauses: float) -> int:
    script = BLOCKED.format(pauses=", ".join(map(str, (*pauses, ""))))
    return subprocess.run([sys.executable, "-c", script], timeout=600).returncode


def test_a_blocked_process_ends_at_the_second_request() -> None:
    assert status(0.0, 1.0) == 128 + signal.SIGUSR1


def test_but_not_at_an_echo_of_the_first() -> None:
    assert status(0.0, 0.1) == 0
