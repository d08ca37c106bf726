"""Saving in the background, on a full disk and with old checkpoints deleted; stopping on request."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

import pretrain_mesh
from megatron_mesh.checkpoint import save as save_module
from megatron_mesh.checkpoint import writer
from megatron_mesh.checkpoint.directory import publish, retire_old, retire_unfinished, saved_steps
from megatron_mesh.checkpoint.index import Box, index_of
from megatron_mesh.checkpoint.integrity import find_damage
from megatron_mesh.checkpoint.reader import read_tensor
from megatron_mesh.config.settings import dump_config
from megatron_mesh.faults.mishaps import failed_saves
from megatron_mesh.runtime import exits, stopping
from megatron_mesh.train import step as step_module
from tests.parallel.saves import FAULTS
from tests.unit.train.conftest import run


def steps(directory: Path) -> list[int]:
    return list(saved_steps(directory))


def test_background_saves_equal_foreground_saves(tiny, straight, tmp_path):
    """A background save stores the state of its step, whatever training does in the meantime."""
    run(tiny(save=str(tmp_path), save_interval=1, async_save=True))
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    for step in (1, 3, 5):
        assert find_damage(tmp_path / f"iter_{step:07d}") == []
        outcome = run(tiny(load=str(tmp_path / f"iter_{step:07d}")))
        assert outcome.values("loss") == straight.values("loss")[step:]
        assert outcome.values("lr") == straight.values("lr")[step:]


def test_a_background_save_copies_before_it_returns():
    """The test above may be lucky: a small file is written before training changes the weights."""
    data = torch.zeros(4)
    (copied,) = writer.host_copies([Box("x", (4,), (0,), data)])
    data.fill_(1)
    assert copied.data.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("background", [False, True])
def test_saves_are_logged_with_their_time(tiny, tmp_path, background):
    outcome = run(tiny(save=str(tmp_path), save_interval=3, async_save=background))
    saves = [r for r in outcome.records if r.kind == "save"]
    assert [r.step for r in saves] == [3, 6]
    for record in saves:
        assert 0 < record.values["stall_seconds"] <= record.values["seconds"]
        assert Path(record.values["path"]).name == f"iter_{record.step:07d}"


def test_a_slow_save_gives_a_warning(tiny, tmp_path, caplog):
    run(tiny(save=str(tmp_path), exit_grace_seconds=1e-6))
    assert "longer than --exit-grace-seconds" in caplog.text


def test_copies_are_freed_as_they_are_written(monkeypatch, tmp_path):
    alive, copied = [], []
    boxes = [Box("x", (8,), (2 * i,), torch.full((2,), float(i))) for i in range(4)]
    original = writer._with_own_storage

    def watched(data):
        alive.append(sum(copy() is not None for copy in copied))
        return original(data)

    def copy_to_host(tensor):
        copy = tensor.clone()
        copied.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(writer, "_with_own_storage", watched)
    monkeypatch.setattr(writer.device, "copy_to_host", copy_to_host)
    future = writer.BackgroundWriter().start(tmp_path / "file", boxes)
    for box in boxes:
        box.data.zero_()  # training continues
    written = future.result()
    assert alive == [4, 3, 2, 1]
    index = index_of(tmp_path, written)
    assert read_tensor(index, "x").tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_disk_error_is_raised_as_oserror(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            writer.write_file(tmp_path / "file", [Box("x", (50_000,), (0,), torch.zeros(50_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


PLACES = ["write_file", "write_small_files", "make_empty", "Content"]


# Every fault in every place, in the foreground and in the background.
FAILURES = [
    (place, fault, (i + j) % 2 == 1) for i, place in enumerate(PLACES) for j, fault in enumerate(FAULTS)
]


@pytest.mark.parametrize(("place", "fault", "background"), FAILURES)
def test_a_failed_save_costs_one_checkpoint(
    tiny, straight, tmp_path, monkeypatch, caplog, place, fault, background
):
    """The save of step 4 fails. Training continues, the checkpoint of step 2 stays, and step 6 is saved."""
    count = 0
    module = writer if background and place == "write_file" else save_module
    original = getattr(module, place)

    def second_fails(*arguments, **more):
        nonlocal count
        count += 1
        if count == 2:
            raise FAULTS[fault]()
        return original(*arguments, **more)

    monkeypatch.setattr(module, place, second_fails)
    outcome = run(tiny(save=str(tmp_path), save_interval=2, async_save=background))
    assert outcome.values("loss") == straight.values("loss")
    assert outcome.ending == exits.DONE
    assert steps(tmp_path) == [2, 6]
    cause = str(FAULTS[fault]()).split("] ")[-1]
    reason = f"{cause} (rank 0 on {socket.gethostname()})"
    assert f"{reason}; later saves try again" in caplog.text
    (recognized,) = failed_saves(caplog.text)  # by the fault test
    assert recognized.endswith(reason)
    assert not list(tmp_path.glob("*.partial"))
    # Unexpected errors are logged with a traceback.
    assert ("Traceback" in caplog.text) == (not isinstance(FAULTS[fault](), OSError))


def test_a_failed_last_save_has_its_exit_status(tiny, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save_module, "write_small_files", full)
    assert run(tiny(save=str(tmp_path))).ending == exits.NOT_SAVED


def test_old_checkpoints_are_deleted(tiny, tmp_path):
    run(tiny(save=str(tmp_path), save_interval=1, keep_last=2, keep_every=3))
    assert steps(tmp_path) == [3, 5, 6]


def test_deletion_and_publication_are_atomic(tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"iter_{step:07d}").mkdir()
    partial = tmp_path / "iter_0000003.partial"
    partial.mkdir()
    (partial / "new").touch()
    publish(partial, tmp_path / "iter_0000003", 3)
    assert (tmp_path / "iter_0000003" / "new").exists()
    assert list(retire_old(tmp_path, 3, 2, None)) == [tmp_path / "iter_0000001.deleting"]
    assert steps(tmp_path) == [2, 3]
    for suffix in ("partial", "replaced", "deleting"):
        (tmp_path / f"iter_0000009.{suffix}").mkdir()
    leaving = retire_unfinished(tmp_path)
    assert len(leaving) == 5 and all(path.suffix == ".deleting" and path.is_dir() for path in leaving)
    names = sorted(path.name for path in tmp_path.iterdir() if path not in leaving)
    assert names == ["iter_0000002", "iter_0000003", "latest_checkpointed_iteration.txt"]


def test_damaged_checkpoints_do_not_displace_good_ones(tiny, tmp_path):
    """After a run has fallen back, the damaged newer checkpoints don't count among those to keep."""
    settings = {"save": str(tmp_path), "load": str(tmp_path), "keep_last": 1}
    run(tiny(**settings, save_interval=2, keep_every=2))
    for step in (4, 6):
        (tmp_path / f"iter_{step:07d}" / "state.json").unlink()
    stopped = run(tiny(**settings, exit_interval=3))
    assert stopped.ending == exits.STOPPED and steps(tmp_path) == [3, 4, 6]
    assert find_damage(tmp_path / "iter_0000003") == []


def test_old_and_unfinished_checkpoints_are_deleted_in_the_background(tiny, tmp_path, monkeypatch):
    """A background thread deletes them, and the interpreter waits for it before it exits."""
    threads = []
    original = save_module.shutil.rmtree

    def slow(path, **more):
        if path.suffix == ".deleting":
            threads.append(threading.current_thread().name)
            time.sleep(0.2)
        original(path, **more)

    monkeypatch.setattr(save_module.shutil, "rmtree", slow)
    killed = tmp_path / "iter_0000001.partial"
    killed.mkdir()
    (killed / "__0_0.distcp").touch()
    run(tiny(save=str(tmp_path), save_interval=1, keep_last=1))
    while list(tmp_path.glob("*.deleting")):
        time.sleep(0.01)
    assert len(threads) == 6 and all(name.startswith("ckpt-pruner") for name in threads)
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000006"]


def test_a_failed_deletion_is_logged(tmp_path, monkeypatch, caplog):
    def busy(path, **more):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(save_module.shutil, "rmtree", busy)
    save_module._delete(tmp_path / "iter_0000001.deleting")
    assert "iter_0000001.deleting cannot be deleted: [Errno 16] Device or resource busy" in caplog.text


def test_a_kill_between_two_renames_loses_no_checkpoint(tiny, straight, checkpoints):
    shutil.rmtree(checkpoints / "iter_0000006")
    newest = checkpoints / "iter_0000004"
    newest.rename(checkpoints / "iter_0000004.replaced")
    (checkpoints / "iter_0000004.partial").mkdir()
    settings = {"load": str(checkpoints), "save": str(checkpoints)}
    assert run(tiny(**settings)).values("loss") == straight.values("loss")[4:]
    assert find_damage(newest) == [] and not (checkpoints / "iter_0000004.replaced").exists()


def test_a_checkpoint_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    final, partial = tmp_path / "iter_0000003", tmp_path / "iter_0000003.partial"
    for path, content in ((final, "old"), (partial, "new")):
        path.mkdir()
        (path / "state.json").write_text(content)
    original = Path.rename

    def fails(path, target):
        if path == partial:
            raise OSError(errno.EIO, "Input/output error")
        return original(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output"):
        publish(partial, final, 3)
    assert (final / "state.json").read_text() == "old"


def test_old_checkpoints_that_stay_do_not_fail_a_save(tiny, tmp_path, monkeypatch, caplog):
    def busy(*arguments):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(save_module.names, "retire_old", busy)
    assert run(tiny(save=str(tmp_path), save_interval=3, keep_last=1)).ending == exits.DONE
    assert steps(tmp_path) == [3, 6] and "cannot be deleted" in caplog.text


def test_a_tracker_that_cannot_be_written_costs_no_checkpoint(tiny, tmp_path, monkeypatch, caplog):
    def full(source, target):
        if Path(target).name == "latest_checkpointed_iteration.txt":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", full)
    assert run(tiny(save=str(tmp_path), save_interval=3)).ending == exits.DONE
    assert steps(tmp_path) == [3, 6]
    assert "latest_checkpointed_iteration.txt was not updated to step 6: " in caplog.text


def test_contents_reach_the_disk_before_names(tmp_path, monkeypatch):
    """So after a power failure, every name refers to contents that are complete."""
    events = []
    sync, rename = os.fsync, os.rename

    def record_sync(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def record_rename(source, target, **more):
        events.append(f"{target} named")
        rename(source, target, **more)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(os, "replace", record_rename)
    partial, final = tmp_path / "iter_0000003.partial", tmp_path / "iter_0000003"
    partial.mkdir()
    for name in ("state.json", "checksums.json"):
        (partial / name).write_text("{}")
    writer.write_file(partial / "__0_0.distcp", [])
    publish(partial, final, 3)
    named = events.index(f"{final} named")
    files = {f"{partial}/{name}" for name in ("state.json", "checksums.json", "__0_0.distcp")}
    assert {str(partial), *files} <= set(events[:named])
    assert events[named + 1] == str(tmp_path)
    tracker = f"{tmp_path}/latest_checkpointed_iteration"
    assert events[named + 2 :] == [f"{tracker}.txt.partial", f"{tracker}.txt named"]


def test_intervals_and_stop_file(tiny, straight, tmp_path):
    """Each start takes some steps and stops. Together they equal the run that never stopped."""
    settings = {"save": str(tmp_path), "load": str(tmp_path)}
    first = run(tiny(**settings, exit_interval=2))
    assert first.ending == exits.STOPPED and steps(tmp_path) == [2]
    second = run(tiny(**settings, exit_duration_in_mins=1e-9))
    assert second.ending == exits.STOPPED and steps(tmp_path) == [2, 3]
    third = run(tiny(**settings))
    assert third.ending == exits.DONE
    found = first.values("loss") + second.values("loss") + third.values("loss")
    assert found == straight.values("loss")


def test_a_stop_request_saves_before_evaluating(tiny, tmp_path):
    (tmp_path / "stop").touch()
    outcome = run(tiny(save=str(tmp_path), eval_interval=1))
    assert outcome.ending == exits.STOPPED and steps(tmp_path) == [1]
    assert outcome.values("loss", "valid") == []
    outcome = run(tiny(save=str(tmp_path), load=str(tmp_path), eval_interval=2, exit_interval=2))
    assert outcome.ending == exits.STOPPED and len(outcome.values("loss", "valid")) == 1


def test_a_complete_run_is_done_despite_a_stop_request(tiny, tmp_path):
    assert run(tiny(save=str(tmp_path), exit_interval=6)).ending == exits.DONE
    # With an evaluation on the test data left to do, the run is not done.
    settings = {"save": str(tmp_path / "other"), "load": str(tmp_path / "other"), "eval_interval": 6}
    assert run(tiny(**settings, exit_interval=6)).ending == exits.STOPPED
    outcome = run(tiny(**settings, exit_interval=6))
    assert outcome.ending == exits.DONE and len(outcome.values("loss", "test")) == 1


def start(arguments: list[str], requests: list[str], stop_file: Path, environment: dict[str, str]) -> None:
    """Start the program in this process, and send it ``requests`` to stop in the middle of step 3."""
    original = step_module.run_batch
    count = 0

    def run_batch(*arguments, **more):
        nonlocal count
        count += 1
        for request in requests if count == 3 else ():
            if request == "file":
                stop_file.touch()
            elif request == "wait":
                time.sleep(stopping.ECHO_SECONDS + 0.1)
            else:
                os.kill(os.getpid(), signal.Signals[request])
        return original(*arguments, **more)

    os.environ |= environment
    stopping.ECHO_SECONDS = 0.5
    torch.set_num_threads(1)
    step_module.run_batch = run_batch
    sys.exit(pretrain_mesh.main(arguments))


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Starts processes quickly, as forks of one that has only imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload", __name__])
    return context


@pytest.mark.parametrize(
    ("how", "slurm"),
    [
        ("SIGTERM", False),
        ("SIGUSR1", False),
        ("file", False),
        ("SIGTERM,SIGTERM", False),  # an echo
        ("SIGTERM,wait,SIGTERM", False),
        ("SIGTERM,wait,SIGTERM", True),
    ],
)
def test_requests_to_stop(tiny, straight, tmp_path, processes, how, slurm):
    save = tmp_path / "run"
    (tmp_path / "config.yaml").write_text(dump_config(tiny(save=str(save), load=str(save))))
    arguments = ["--config", str(tmp_path / "config.yaml")]
    environment = {"SLURM_JOB_ID": "1"} if slurm else {}
    process = processes.Process(target=start, args=(arguments, how.split(","), save / "stop", environment))
    process.start()
    process.join(100)
    if "wait" in how and not slurm:
        assert process.exitcode == 128 + signal.SIGTERM and steps(save) == []
        assert (save / "run_status.txt").read_text() == "running\n"
        return
    assert process.exitcode == exits.STOPPED
    assert steps(save) == [3] and not (save / "stop").exists()
    assert (save / "run_status.txt").read_text() == "stopped\n"
    outcome = run(tiny(load=str(save)))
    assert outcome.values("loss") == straight.values("loss")[3:]
