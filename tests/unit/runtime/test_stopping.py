"""The second request to stop, which must not wait for anybody."""

import errno
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


def test_errors_of_the_stop_file_do_not_end_training(tmp_path, monkeypatch, caplog) -> None:
    """A shared file system may answer with a stale handle or an I/O error, for this file alone."""
    stop_file, real = str(tmp_path / "stop"), {name: getattr(os, name) for name in ("stat", "unlink")}
    error = OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def refuse(name: str):
        def call(path, *args, **kwargs):
            if not isinstance(path, int) and os.fspath(path) == stop_file:
                raise error
            return real[name](path, *args, **kwargs)

        return call

    stop = StopRequests(CheckpointConfig(save=str(tmp_path)), 0.0)
    with one_process(tiny_config()):
        for name in real:
            monkeypatch.setattr(os, name, refuse(name))
        with stop.listening():
            assert stop.reason(1) == ""
        stop.remove_stop_file()
        assert caplog.text.count("stop: [Errno 116] Stale file handle") == 2
        monkeypatch.undo()
        (tmp_path / "stop").touch()
        assert stop.reason(2) == "the stop file"
