"""tools/submit_slurm.py --change: other nodes or settings for a submitted run."""

import shutil
from pathlib import Path

import pytest

from megatron_mesh.config.settings import read_yaml
from megatron_mesh.errors import UserError
from tests.unit.slurm.conftest import FAILED, PENDING, RUNNING, SUSPENDED
from tests.unit.slurm.tool import main, submit


@pytest.fixture
def run(lab: Path, capsys: pytest.CaptureFixture) -> Path:
    """A run submitted as job 41."""
    submit(lab)
    capsys.readouterr()
    return lab / "run"


def files(run: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (run / "slurm").iterdir() if path.is_file()}


def test_other_nodes_of_a_run_that_is_over(lab, run, capsys, monkeypatch) -> None:
    """The earlier files are saved, and the new job is held until the new files are in place."""
    monkeypatch.setenv("JOB", FAILED)
    before = files(run)
    monkeypatch.chdir(lab)  # the job keeps its working directory
    main(["--change", str(run), "--nodes", "2", "--time", "12:00:00"])
    said = capsys.readouterr().out
    assert "nodes: 1 -> 2\n" in said and "time: 24:00:00 -> 12:00:00\n" in said and said.count("->") == 2
    assert f"submitted job 42; the earlier files are in {run}/slurm/before-1" in said
    assert "--hold" in (lab / "sbatch").read_text().splitlines()[1]
    assert (lab / "scontrol").read_text() == "release 42\n"
    for name in ("job.sbatch", "config.yaml", "site.sh"):
        assert (run / "slurm/before-1" / name).read_text() == before[name]
    now = files(run)
    assert now["job.sbatch"] == before["job.sbatch"].replace("=1\n", "=2\n", 1).replace("24:00", "12:00")
    assert now["config.yaml"] == before["config.yaml"] and now["jobs.txt"] == "41\n42\n"
    assert "by-hand" in now["starts.txt"]


def test_settings_of_a_waiting_job(lab, run, capsys, monkeypatch) -> None:
    """The job reads them when it starts, so it keeps its place in the queue; it is held while they change."""
    monkeypatch.setenv("JOB", PENDING)
    main(["--change", str(run), "--lr", "0.5"])
    said = capsys.readouterr().out
    assert "-> 0.5\n" in said and "job 41 keeps its place in the queue" in said
    assert read_yaml(run / "slurm/config.yaml")["lr"] == 0.5
    assert read_yaml(run / "slurm/before-1/config.yaml")["lr"] != 0.5
    assert (lab / "scontrol").read_text() == "hold 41\nrelease 41\n" and not (lab / "scancel").exists()
    main(["--change", str(run), "--lr", "0.25"])
    assert read_yaml(run / "slurm/before-2/config.yaml")["lr"] == 0.5


def test_other_nodes_of_waiting_jobs(lab, capsys, monkeypatch) -> None:
    """A chain is cancelled once a new one of the same length is in the queue."""
    submit(lab, "--chain", "3")
    monkeypatch.setenv("JOB", PENDING)
    main(["--change", str(lab / "run"), "--nodes", "2"])
    assert "submitted job 44, 45, 46 in place of 41, 42, 43" in capsys.readouterr().out
    assert (lab / "scancel").read_text().split() == ["43", "42", "41"]
    assert (lab / "scontrol").read_text() == "release 44,45,46\n"
    assert "REQUEUE=no" in (lab / "run/slurm/job.sbatch").read_text()


def test_another_site_file(lab, run, capsys, monkeypatch) -> None:
    other = lab / "other.sh"
    other.write_text((lab / "site.sh").read_text().replace("--partition=gpu", "--partition=big"))
    main(["--change", str(run), "--site", str(other), "--dry-run"])
    assert capsys.readouterr().out == f"site file: as {other} is now\n"
    assert not (run / "slurm/before-1").exists()
    main(["--change", str(run), "--site", str(other)])
    assert "--partition=big" in (run / "slurm/job.sbatch").read_text()


@pytest.mark.parametrize(
    "job,flags,message",
    [
        (
            RUNNING,
            ["--nodes", "2"],
            "job 41 of .* is RUNNING; stop it first: touch .*/stop saves and ends it",
        ),
        (SUSPENDED, ["--nodes", "2"], "is suspended"),
        ("", [], "nothing changes"),
        ("", ["--nodes", "1"], "nothing changes"),
        ("", ["--nodes", "3"], "global"),
        ("", ["--time", "1"], "is too short: the early warning"),
        ("", ["--gpu-memory-gib", "0.0001", "--lr", "1"], "GiB, more than --gpu-memory-gib 0.0001"),
        ("", ["--save", "/elsewhere"], "would be another run"),
        ("", ["--config", "other.yaml"], "leave out --config"),
        ("", ["--sweep", "seed=1,2"], "--sweep is for a new run"),
        ("", ["--hiden-size", "3"], "did you mean --hidden-size"),
    ],
)
def test_a_refused_change_changes_nothing(lab, run, monkeypatch, job, flags, message) -> None:
    monkeypatch.setenv("JOB", job)
    before = files(run)
    with pytest.raises(UserError, match=message):
        main(["--change", str(run), *flags])
    assert files(run) == before and (lab / "sbatch").read_text().count("\n") == 1
    assert not (lab / "scontrol").exists()


def test_a_change_that_sbatch_refuses_leaves_the_waiting_job(lab, run, monkeypatch) -> None:
    monkeypatch.setenv("JOB", PENDING)
    monkeypatch.setenv("REFUSE", "error: Node count specification invalid")
    before = files(run)
    with pytest.raises(UserError, match="Node count"):
        main(["--change", str(run), "--nodes", "2"])
    assert files(run) == before and not (lab / "scancel").exists() and not (run / "slurm/next").exists()
    monkeypatch.setenv("REFUSE", "")
    main(["--change", str(run), "--nodes", "2"])


@pytest.mark.parametrize("flags,undone", [(["--lr", "1"], "release 41"), (["--nodes", "2"], "")])
def test_a_change_on_a_full_disk_leaves_jobs_as_they_were(lab, run, monkeypatch, flags, undone) -> None:
    copy = shutil.copy

    def full(source: Path, target: Path) -> Path:
        if Path(source).name == "config.yaml":  # the second of three
            raise OSError(28, "No space left on device", "config.yaml")
        return copy(source, target)

    before = files(run)
    monkeypatch.setattr(shutil, "copy", full)
    monkeypatch.setenv("JOB", PENDING)
    with pytest.raises(UserError, match=r"config.yaml cannot be written .No space left on device."):
        main(["--change", str(run), *flags])
    assert files(run) == before and not (run / "slurm/before-1").exists()
    if undone:
        assert (lab / "scontrol").read_text().splitlines()[-1] == undone and not (lab / "scancel").exists()
    else:
        assert (lab / "scancel").read_text() == "42\n"  # not the waiting job


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device", "jobs.txt")])
def test_a_change_that_is_interrupted_is_undone(lab, run, monkeypatch, error) -> None:
    """Ctrl-C, or a full disk, after the new job is in the queue and the files are in place."""

    def interrupted(*_: object) -> None:
        raise error

    monkeypatch.setattr("megatron_mesh.slurm.actions.record_jobs", interrupted)
    monkeypatch.setenv("JOB", PENDING)
    before = files(run)
    with pytest.raises((KeyboardInterrupt, UserError)):
        main(["--change", str(run), "--nodes", "2"])
    now = files(run)
    assert now.pop("starts.txt") == "by-hand -\n" and now == before
    assert not (run / "slurm/before-1").exists() and not (run / "slurm/next").exists()
    assert (lab / "scancel").read_text() == "42\n"


def test_more_jobs_are_a_difference(lab, run, capsys, monkeypatch) -> None:
    monkeypatch.setenv("JOB", PENDING)
    main(["--change", str(run), "--chain", "3"])
    said = capsys.readouterr().out
    assert said.startswith("jobs: 1 -> 3\n") and "submitted job 42, 43, 44 in place of 41" in said
    monkeypatch.setenv("JOB_41", FAILED)
    main(["--change", str(run), "--chain", "2"])
    said = capsys.readouterr().out
    assert said.startswith("jobs: 3 -> 2\n") and "submitted job 45, 46 in place of 42, 43, 44" in said


def test_runs_that_cannot_be_changed(lab, run) -> None:
    (run / "run_status.txt").write_text("done\n")
    with pytest.raises(UserError, match="trained to the end"):
        main(["--change", str(run), "--lr", "1"])
    with pytest.raises(UserError, match=r"was not submitted with submit_slurm\.py"):
        main(["--change", str(lab), "--lr", "1"])
