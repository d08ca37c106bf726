"""How the ranks of a job find their own store: ports that are taken, and jobs side by side on one host.

Case 14 of everyday faults and case 6 on SLURM: two job steps of one allocation on one node.
"""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mesh.errors import RanksLost, UserError
from megatron_mesh.runtime import exits, rendezvous
from megatron_mesh.runtime.distributed import shared_store
from megatron_mesh.runtime.failures import Failures
from megatron_mesh.runtime.rendezvous import (
    Meeting,
    PortTaken,
    Rendezvous,
    Signpost,
    find_rendezvous,
    open_store,
)
from tests.helpers import tiny_config

ROOT = Path(__file__).resolve().parents[3]
SHORT, LONG = timedelta(seconds=2), timedelta(seconds=60)
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1", "MASTER_ADDR": "localhost"}


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(rendezvous, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(rendezvous, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(rendezvous, "FOREIGN_SECONDS", 0.5)


@pytest.fixture
def ports() -> tuple[int, ...]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("", 0))) for _ in range(3)]
        return tuple(probe.getsockname()[1] for probe in probes)


def meet(*places: Rendezvous) -> list[tuple[dist.Store, int]]:
    """Rank 0 and rank 1 of each job, all at the same time: rank 1's store, and what it finds there."""
    found: dict[int, tuple[dist.Store, int]] = {}
    posts = []

    def rank(job: int, number: int) -> None:
        store, post = open_store(places[job], number, 2, LONG)
        posts.append(post)
        if number == 0:
            store.set("job", str(job))
            kept.append(store)
        else:
            found[job] = store, int(store.get("job"))

    kept: list[dist.Store] = []
    threads = [threading.Thread(target=rank, args=(j, n)) for n in (1, 0) for j in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for post in filter(None, posts):
        post.close()
    return [found[job] for job in range(len(places))]


def test_two_jobs_with_the_same_ports_both_meet(ports) -> None:
    """The second takes the next port, and no rank ends up in the other's store."""
    places = [Rendezvous("localhost", ports, False, (), name) for name in ("one", "two")]
    assert [job for _, job in meet(*places)] == [0, 1]


@pytest.fixture(params=["silent", "talks"])
def stranger(request, ports) -> Iterator[None]:
    """Another service at the first port."""
    if request.param == "silent":
        with socket.create_server(("", ports[0])):
            yield
        return
    post = Signpost(ports[0])
    post.show(job="another", port=1)
    yield
    post.close()


def test_a_port_of_another_service_is_passed_over(stranger, ports) -> None:
    assert [job for _, job in meet(Rendezvous("localhost", ports, False, (), "mine"))] == [0]


def test_a_given_port_that_is_taken_is_one_clear_error(stranger, ports) -> None:
    """On every rank, without a wait for the timeout; the port is not changed."""
    given = Rendezvous("localhost", ports[:1], True, ports[1:], "mine")
    with pytest.raises(
        UserError, match=rf"cannot listen at port {ports[0]} \(MASTER_PORT\): Address already"
    ):
        open_store(given, 0, 2, LONG)
    with pytest.raises(UserError, match=rf"something else answers at port {ports[0]} on localhost"):
        open_store(given, 1, 2, LONG)


def test_ranks_hear_that_the_given_port_is_taken(stranger, ports, monkeypatch, capfd) -> None:
    """Rank 0 gives the cause at a spare port, and the other rank ends silently with the same status."""
    monkeypatch.setattr(rendezvous, "FOREIGN_SECONDS", 60)
    monkeypatch.setattr(Meeting, "held", False)
    place = Rendezvous("localhost", ports[:1], True, ports[1:], "mine")
    monkeypatch.setattr(rendezvous, "find_rendezvous", lambda: place)
    ends: dict[int, object] = {}

    def other() -> None:
        try:
            Meeting(1, 2, LONG).start()
        except SystemExit as end:
            ends[1] = end.code

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(UserError, match="cannot listen"):
        Meeting(0, 2, LONG)
    meeting_of_zero = rendezvous.meet_to_fail(0, 2)
    ends[0] = meeting_of_zero.fail(Failures(meeting_of_zero.store), "rank 0", "port taken", "failed", 2, "")
    thread.join()
    assert ends == {0: 2, 1: 2} and capfd.readouterr().err == "error: rank 0: port taken\n"


def test_a_signpost_outlives_an_error(ports) -> None:
    """Such as a limit of open files that is reached for a moment; it ends when it is closed."""
    post, place = Signpost(ports[0]), Rendezvous("localhost", ports[:1], False, (), "mine")
    listener, failures = post._listener, iter([errno.EMFILE, errno.ECONNABORTED])

    class Failing:
        def accept(self) -> object:
            for number in failures:
                raise OSError(number, os.strerror(number))
            return listener.accept()

        def __getattr__(self, name: str) -> object:
            return getattr(listener, name)

    post._listener, before = Failing(), set(threading.enumerate())
    post.show(job="mine", port=5)
    assert rendezvous._look_for_store(place, LONG) == 5
    (thread,) = set(threading.enumerate()) - before
    post.close()
    thread.join(60)
    assert not thread.is_alive() and next(failures, None) is None


def test_a_given_port_that_is_freed_in_time_is_used(ports, monkeypatch) -> None:
    """Two jobs with the same MASTER_PORT: the first needs it until all of its ranks have come."""
    monkeypatch.setattr(rendezvous, "PATIENCE_SECONDS", 60)
    monkeypatch.setattr(rendezvous, "FOREIGN_SECONDS", 60)
    first = Signpost(ports[0])
    first.show(job="another", port=1)
    threading.Timer(1.0, first.close).start()
    assert [job for _, job in meet(Rendezvous("localhost", ports[:1], True, ports[1:], "mine"))] == [0]


def test_no_rank_zero(ports) -> None:
    with pytest.raises(RanksLost, match=r"rank 0 does not answer at localhost:.* after 2 s .*refused"):
        open_store(Rendezvous("localhost", ports, False, (), "mine"), 1, 2, SHORT)


def test_a_rank_that_is_there_twice_is_refused(ports, monkeypatch) -> None:
    """Two jobs started by hand with the same MASTER_PORT cannot be distinguished otherwise."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(ports[0]))
    first = Meeting(0, 2, LONG)
    second = Meeting(1, 2, LONG)
    with pytest.raises(UserError, match="another process is rank 1 of this job"):
        Meeting(1, 2, LONG)
    assert first.store.add("meeting/came/1", 0) == 2 and second.store.check(["meeting/came/0"])
    # Case 14: ranks above 1 are silent about a port that everybody finds taken, and about nothing else.
    third = Meeting(2, 3, LONG)
    with pytest.raises(UserError, match="another process is rank 2 of this job"):
        shared_store(tiny_config(), 2, 3, LONG)
    assert third.store.add("meeting/came/2", 0) == 2
    first._signpost.close()


@pytest.mark.parametrize("stranger", ["talks"], indirect=True)
def test_two_ranks_report_a_taken_port(stranger, ports, monkeypatch, capfd) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(ports[0]))
    for rank in (0, 1):
        with pytest.raises(PortTaken):
            shared_store(tiny_config(), rank, 3, LONG)
    with pytest.raises(SystemExit) as end:
        shared_store(tiny_config(), 2, 3, LONG)
    assert end.value.code == exits.BAD_INPUT and capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "user"])
def test_ports_follow_from_job_step_restart_and_user(monkeypatch, name: str) -> None:
    for variable, value in SLURM.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(os, "getuid", lambda: 1000)  # with one in 40 users, two of 16 ports would be the same
    one, same = find_rendezvous(), find_rendezvous()
    assert one == same and not one.given and len(set(one.ports)) == len(one.ports) == 8
    assert all(20000 <= port < 32000 for port in one.ports)
    if name == "user":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    else:
        monkeypatch.setenv(name, "99")
    other = find_rendezvous()
    assert other.job != one.job and not set(other.ports) & set(one.ports)


def test_a_given_port_stays(monkeypatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert find_rendezvous().ports == (1234,) and find_rendezvous().given
    monkeypatch.setenv("MASTER_PORT", "http")
    with pytest.raises(UserError, match="MASTER_PORT=http is not a port"):
        find_rendezvous()


def test_without_an_address_the_remedy_is_named(monkeypatch) -> None:
    with pytest.raises(
        UserError, match=r"MASTER_ADDR is not set .this is not a SLURM job step.; start with tor"
    ):
        find_rendezvous()


def test_there_is_one_formula() -> None:
    """The batch script computes no port of its own."""
    folders = (ROOT / "megatron_mesh/slurm", ROOT / "examples/slurm")
    scripts = [path for folder in folders for path in folder.glob("*") if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) >= 6
    for path in scripts:
        lines = path.read_text().splitlines()
        named = [line for line in lines if "MASTER_PORT" in line and not line.startswith(("unset ", "#"))]
        assert not named, path  # whether with =, export, env or printf
