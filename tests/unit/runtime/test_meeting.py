"""Many ranks, as threads, meet in a real store."""

import os
import socket
import threading
import time
from datetime import timedelta

import pytest

from megatron_mesh.runtime import exits
from megatron_mesh.runtime.distributed import shared_store
from megatron_mesh.runtime.rendezvous import Meeting
from tests.helpers import tiny_config

RANKS, ABSENT = 24, {5, 17}


@pytest.fixture
def rendezvous(monkeypatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(Meeting, "held", False)


def meet(present: set[int], timeout: timedelta) -> dict[int, object]:
    """How each rank's start ends: "started", its exit status, or an error that would have a traceback."""
    config, outcomes, ended = tiny_config(), {}, threading.Barrier(len(present), timeout=120)

    def rank(number: int) -> None:
        try:
            store = shared_store(config, number, RANKS, timeout)
            ended.wait()  # rank 0 holds the store
            del store
            outcomes[number] = "started"
        except SystemExit as end:
            outcomes[number] = end.code
        except Exception as error:
            outcomes[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in sorted(present)]
    for number, thread in enumerate(threads):
        thread.start()
        if number == 0:  # a client that looks for a store keeps Python's other threads waiting
            listening()
    for thread in threads:
        thread.join()
    return outcomes


def listening() -> None:
    """Wait for rank 0's store."""
    while True:
        try:
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))).close()
            return
        except OSError:
            time.sleep(0.05)


def test_one_rank_says_who_is_absent(rendezvous, capfd) -> None:
    """The others end quietly, without asking the store as well, and rank 0 takes it away last."""
    present = set(range(RANKS)) - ABSENT
    assert meet(present, timedelta(seconds=2)) == dict.fromkeys(present, exits.CRASHED)
    errors = [line for line in capfd.readouterr().err.splitlines() if "rror" in line]
    host = socket.gethostname()
    assert len(errors) == 1 and errors[0].startswith("error: rank ")
    assert f"of {RANKS} on host {host}: 2 of {RANKS} ranks did not arrive within 2 s (--dist" in errors[0]
    assert ": 5, 17; check that they were started" in errors[0]


def test_all_ranks_come(rendezvous, capfd) -> None:
    assert meet(set(range(RANKS)), timedelta(seconds=60)) == dict.fromkeys(range(RANKS), "started")
    assert capfd.readouterr().err == ""
