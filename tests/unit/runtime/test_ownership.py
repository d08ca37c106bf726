"""Only one start owns a run's directory: a second is refused, and a dead owner is replaced."""

import ctypes
import errno
import json
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_mesh.data import cache
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import owner_file, ownership
from megatron_mesh.runtime.entry import failures_from
from megatron_mesh.runtime.failures import FAILED
from megatron_mesh.runtime.owner_file import Owner, held_by_another, read_owner
from megatron_mesh.runtime.ownership import Ownership
from megatron_mesh.runtime.run_files import OWNER_FILE
from megatron_mesh.train import pretrain
from megatron_mesh.train.output import check_writable
from tests.helpers import tiny_config


def _own(directory: Path, claimed) -> None:
    mine = Ownership(directory)
    mine.claim()
    mine.keep(lambda other: os._exit(7))
    claimed.set()
    time.sleep(100)


@pytest.fixture
def owner(tmp_path: Path, monkeypatch) -> Iterator[multiprocessing.Process]:
    """A living process that owns ``tmp_path``."""
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(ownership, "SILENCE_SECONDS", 2.0)
    context = multiprocessing.get_context("fork")
    claimed = context.Event()
    process = context.Process(target=_own, args=(tmp_path, claimed))
    process.start()
    assert claimed.wait(60)
    yield process
    process.kill()
    process.join()


@pytest.fixture
def elsewhere(monkeypatch) -> None:
    """Make this process believe that ``owner`` is on another machine, whose processes it can't see."""
    monkeypatch.setattr(owner_file, "_machine", lambda: "another machine")


def tree(directory: Path) -> dict[str, bytes]:
    """Return the files in ``directory`` and their contents, except for the owner's file."""
    files = {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
    return {str(path): content for path, content in files.items() if path.name != OWNER_FILE}


def test_a_second_start_is_refused_and_touches_nothing(owner, tmp_path: Path, caplog) -> None:
    """The first start's unfinished checkpoint, status and metrics stay as they are."""
    (tmp_path / "iter_0000004.partial").mkdir()
    (tmp_path / "iter_0000004.partial/__0_0.distcp").write_bytes(b"half")
    (tmp_path / "iter_0000002.replaced").mkdir()
    (tmp_path / "run_status.txt").write_text("running\n")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\n')
    before = tree(tmp_path)
    who = json.loads((tmp_path / OWNER_FILE).read_text().splitlines()[1])
    for load in (str(tmp_path), None):
        config = tiny_config(save=str(tmp_path), load=load)
        with pytest.raises(UserError) as refusal:
            pretrain(config)
    said = f"is in use by process {owner.pid} on host {who['host']}, since {who['since']}; wait until it ends"
    assert said in str(refusal.value)
    # An error found before the directory is claimed changes nothing either.
    failures_from(["--save", str(tmp_path), "--load", str(tmp_path)]).note(FAILED, "no data")
    assert tree(tmp_path) == before
    assert (tmp_path / "iter_0000002.replaced").is_dir() and owner.is_alive()


def test_a_killed_owner_on_this_machine_is_replaced_at_once(owner, tmp_path: Path, caplog) -> None:
    """Without waiting for the counter to change, even if the process is a zombie."""
    os.kill(owner.pid, signal.SIGKILL)
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
    assert held_by_another(tmp_path, None) is False
    mine = Ownership(tmp_path)
    with caplog.at_level("INFO", logger="megatron_mesh"):
        mine.claim()
    assert "waiting up to" not in caplog.text
    assert read_owner(tmp_path / OWNER_FILE).who["pid"] == os.getpid()
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_a_living_owner_on_another_machine_is_recognized_by_its_counter(
    owner, elsewhere, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"is in use by process {owner.pid} on host"):
        Ownership(tmp_path).claim()


def test_a_silent_owner_on_another_machine_loses_the_directory(owner, elsewhere, tmp_path: Path) -> None:
    """It was only suspended. When it wakes up, it ends without writing to the new owner's file."""
    os.kill(owner.pid, signal.SIGSTOP)
    mine = Ownership(tmp_path)
    mine.claim()
    text = (tmp_path / OWNER_FILE).read_text()
    os.kill(owner.pid, signal.SIGCONT)
    owner.join(60)
    assert owner.exitcode == 7
    assert (tmp_path / OWNER_FILE).read_text() == text
    mine.release()


@pytest.mark.parametrize("stale", [b"", b"7.0\n", b"dead\n{}\n000000000001\n", b"dead\n{\n"])
def test_one_of_many_takes_over_a_stale_file(tmp_path: Path, stale: bytes, monkeypatch) -> None:
    """Some files are truncated. All starts find the file stale at the same time."""
    monkeypatch.setattr(ownership, "SILENCE_SECONDS", 0.3)
    (tmp_path / OWNER_FILE).write_bytes(stale)
    starts, outcomes, here = [Ownership(tmp_path) for _ in range(4)], [], threading.Barrier(4)

    def claim(mine: Ownership) -> None:
        here.wait()
        try:
            outcomes.append(mine.claim())
        except UserError as refusal:
            assert f"process {os.getpid()} on host" in str(refusal)

    threads = [threading.Thread(target=claim, args=(each,)) for each in starts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1 and read_owner(tmp_path / OWNER_FILE).token == outcomes[0]
    for each in starts:
        each.release()
    assert list(tmp_path.iterdir()) == []


def test_the_output_of_a_run_stays_out_of_the_directory_of_another(owner, tmp_path: Path) -> None:
    """``--output-dir`` alone would rename the other run's metrics."""
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = tree(tmp_path)
    config = tiny_config(output_dir=str(tmp_path), data_path=["none"])
    with pytest.raises(UserError, match=f"--output-dir {tmp_path} belongs to process {owner.pid}"):
        check_writable(config)
    assert tree(tmp_path) == before


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch) -> None:
    def refused(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    mine, other = Ownership(tmp_path), Ownership(tmp_path)
    assert read_owner(tmp_path / OWNER_FILE) is None
    mine.claim()
    mine._beat(7)
    assert (tmp_path / OWNER_FILE).read_text().endswith("000000000007\n")
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
        other.claim()
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_was_killed_while_it_took_over(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ownership, "SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(ownership, "TURN_SECONDS", 0.2)
    (tmp_path / OWNER_FILE).write_text("dead\n")
    (tmp_path / f"{OWNER_FILE}.takeover").touch()
    mine = Ownership(tmp_path)
    assert mine.claim() == read_owner(tmp_path / OWNER_FILE).token
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_the_file_of_a_faster_start_stays(tmp_path: Path) -> None:
    """Another start has taken over since this one found the owner dead."""
    (tmp_path / OWNER_FILE).write_text("winner\n")
    assert not Ownership(tmp_path)._replace(Owner("dead"))
    assert read_owner(tmp_path / OWNER_FILE).token == "winner"
    assert [path.name for path in tmp_path.iterdir()] == [OWNER_FILE]


def test_releasing_leaves_the_file_of_another_owner(tmp_path: Path) -> None:
    """A start that was taken for dead ends after another one has taken over."""
    mine = Ownership(tmp_path)
    mine.claim()
    (tmp_path / OWNER_FILE).write_text("winner\n")
    mine.release()
    assert read_owner(tmp_path / OWNER_FILE).token == "winner"


def test_a_batch_script_owns_the_file_before_and_after_the_run(tmp_path: Path, monkeypatch) -> None:
    """The first line stays the token, which task.sh reads."""
    (tmp_path / OWNER_FILE).write_text("7.1\n")
    assert held_by_another(tmp_path, None)
    monkeypatch.setenv("MESH_RUN_TOKEN", "7.1")
    assert not held_by_another(tmp_path, None)
    mine = Ownership(tmp_path)
    assert mine.claim() == "7.1"
    assert read_owner(tmp_path / OWNER_FILE).who["pid"] == os.getpid()
    mine.release()
    assert (tmp_path / OWNER_FILE).read_text().startswith("7.1\n")


def test_a_refused_start_leaves_no_directory(tmp_path: Path) -> None:
    config = tiny_config(save=str(tmp_path / "new/run"), load=str(tmp_path / "absent"))
    with pytest.raises(UserError, match="absent does not exist"):
        pretrain(config)
    assert list(tmp_path.iterdir()) == []


def test_the_counter_rises_while_an_index_is_built(tmp_path: Path, monkeypatch) -> None:
    """Even if C++ holds the GIL for longer than an owner may be silent."""
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.1)
    reading, writing = os.pipe()
    mine = Ownership(tmp_path)
    mine.claim()
    path, at_first = tmp_path / OWNER_FILE, (tmp_path / OWNER_FILE).read_text()

    def hold_the_lock() -> cache.Arrays:
        """Return 1 when the other thread has seen the counter rise, or 0 after 20 s."""
        pollfd = (ctypes.c_int * 2)(reading, select.POLLIN)
        return {"seen": np.array([ctypes.PyDLL(None).poll(pollfd, 1, 20_000)])}

    def look() -> None:
        while path.read_text() == at_first:
            time.sleep(0.05)
        os.write(writing, b"seen")

    looking = threading.Thread(target=look)
    key = cache.Key(tmp_path / "cache", "test", "what it depends on")
    mine.keep(lambda other: os._exit(7))
    looking.start()
    cache.build_entry(key, hold_the_lock)
    looking.join()
    mine.release()
    assert cache.load(key)["seen"] == [1]


def test_the_owner_restores_its_file_if_somebody_removes_it(tmp_path: Path, monkeypatch) -> None:
    """The new file names the same owner, and its counter rises."""
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.1)
    mine, path = Ownership(tmp_path), tmp_path / OWNER_FILE
    mine.claim()
    who = path.read_text().splitlines()[:2]
    mine.keep(lambda other: os._exit(7))
    path.unlink()
    seen: set[str] = set()
    while len(seen) < 3:
        if path.exists():
            *owner, counter = path.read_text().splitlines()
            assert owner == who
            seen.add(counter)
        time.sleep(0.05)
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
        Ownership(tmp_path).claim()
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_environment_variables_of_squeue_do_not_hide_the_owners_job(tmp_path, monkeypatch) -> None:
    """SQUEUE_PARTITION=high makes squeue print nothing for a job of another partition."""
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ -n "$SQUEUE_PARTITION" ] || echo 7\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SQUEUE_PARTITION", "high")
    assert Owner("7.0").has_slurm_job()
