"""What failing ranks write to run_status.txt, whoever is first, and what they leave alone."""

import signal
import socket
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mesh.errors import UserError
from megatron_mesh.runtime import entry, exits, rendezvous
from megatron_mesh.runtime.entry import failures_from, report_errors
from megatron_mesh.runtime.environment import check_rank
from megatron_mesh.runtime.failures import FAILED, RUNNING, Failures, resumes

RANKS = 16


@pytest.mark.parametrize("running", [True, False])
def test_each_of_many_causes_at_once_is_noted(tmp_path: Path, running: bool) -> None:
    """The ranks as threads, each with its own cause."""
    store, here = dist.HashStore(), threading.Barrier(RANKS)
    if running:
        (tmp_path / "run_status.txt").write_text("running\n")

    def rank(number: int) -> None:
        failures = Failures(store, str(tmp_path))
        failures.running = running
        here.wait()
        failures.report(f"rank {number}", f"cause {number}", FAILED)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    word, *lines = (tmp_path / "run_status.txt").read_text().splitlines()
    assert word == "failed"
    assert sorted(lines) == sorted(f"rank {number}: cause {number}" for number in range(RANKS))


def note(save: Path, word: str, text: str, *, load: str = "", alone: bool = False) -> str:
    """Fail a start before it has written ``running``; return the status file afterwards."""
    command = ["--save", str(save), *(["--load", load] if load else [])]
    failures_from(command, None if alone else dist.HashStore()).note(word, text)
    path = save / "run_status.txt"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("before", ["stopped\n", "failed\nrank 3: old cause\n", "done\n"])
def test_a_resume_that_fails_says_why(tmp_path: Path, before: str, alone: bool) -> None:
    (tmp_path / "iter_0000010").mkdir()
    (tmp_path / "run_status.txt").write_text(before)
    assert note(tmp_path, FAILED, "no data", load=f"{tmp_path}/", alone=alone) == "failed\nno data\n"
    assert note(tmp_path, FAILED, "no GPU", load=str(tmp_path), alone=alone) == "failed\nno GPU\n"


def test_a_resume_without_a_status_file_says_why(tmp_path: Path) -> None:
    (tmp_path / "iter_0000010").mkdir()
    assert note(tmp_path, RUNNING, "out of memory", load=str(tmp_path)) == "running\nout of memory\n"


def test_a_second_start_does_not_end_a_run_that_runs(tmp_path: Path) -> None:
    """The word stays. The cause is added once, for the run may as well have crashed."""
    (tmp_path / "iter_0000010").mkdir()
    (tmp_path / "run_status.txt").write_text("running\n")
    for _ in range(2):
        assert note(tmp_path, FAILED, "port in use", load=str(tmp_path)) == "running\nport in use\n"


@pytest.mark.parametrize("load", ["", "elsewhere"])
@pytest.mark.parametrize("before", ["stopped\n", "running\n", "done\n"])
def test_a_start_leaves_another_runs_directory_alone(tmp_path: Path, before: str, load: str) -> None:
    (tmp_path / "iter_0000010").mkdir()
    assert note(tmp_path, FAILED, "no data", load=load) == ""
    (tmp_path / "run_status.txt").write_text(before)
    assert note(tmp_path, FAILED, "no data", load=load) == before


def test_what_resumes(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert resumes(str(tmp_path), f"{link}/", False)
    assert not resumes(str(tmp_path), str(tmp_path), True)
    assert not resumes(str(tmp_path), None, False) and not resumes(None, None, False)


def test_the_directory_comes_from_the_command_line_or_its_yaml_file(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"save: {tmp_path}\nload: {tmp_path}\nfinetune: true\n")
    (tmp_path / "iter_0000010").mkdir()
    for more, expected in (([], ""), (["--no-finetune"], "failed\nno data\n")):
        failures_from(["--config", str(config), *more, "--bf16"]).note(FAILED, "no data")
        path = tmp_path / "run_status.txt"
        assert (path.read_text() if path.exists() else "") == expected


@pytest.mark.parametrize("local_rank", ["0", "3"])
def test_a_rank_reports_its_error_when_the_others_do_not_arrive(monkeypatch, capfd, local_rank: str) -> None:
    """The first rank of a host reports the error while it still looks for the others."""
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(entry, "SECONDS_ALONE", 0.0)
    reported = threading.Event()
    report = Failures.report
    monkeypatch.setattr(Failures, "report", lambda *args: (report(*args), reported.set()))

    def look(*_: int) -> None:
        """Wait for the others, until this rank has reported."""
        reported.wait(60 if local_rank == "0" else 0.5)

    monkeypatch.setattr(rendezvous, "meet_to_fail", look)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end, report_errors([]):
            raise UserError("no data")
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert end.value.code == 2
    assert capfd.readouterr().err == f"error: rank 5 of 8 on host {socket.gethostname()}: no data\n"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "this process is rank 2 of a job of 2 processes"),
        ({"RANK": "1"}, "this process is rank 1 of a job of 1 processes"),
        ({"SLURM_PROCID": "1"}, "this process is rank 1 of a job of 1 processes"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "rank 0 of a job of 0 processes"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "rank -1 of a job of 2 processes"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x in the environment is not a whole number"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x in the environment is not a whole number"),
    ],
)
def test_ranks_that_cannot_be(monkeypatch, capsys, variables: dict[str, str], message: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended, report_errors([]):
        check_rank()
    assert ended.value.code == exits.BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
