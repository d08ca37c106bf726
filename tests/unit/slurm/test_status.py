"""tools/submit_slurm.py --status, --requeue, --cancel and --follow, with fake SLURM commands."""

import json
import os
import re
from datetime import datetime
from pathlib import Path

import pytest

from megatron_mesh.errors import UserError
from megatron_mesh.slurm.actions import run_directory
from megatron_mesh.slurm.follow import follow
from megatron_mesh.slurm.status import UNFINISHED
from tests.unit.slurm.conftest import FAILED, PENDING, ROOT, RUNNING, SUSPENDED
from tests.unit.slurm.tool import log_steps, main, submit


@pytest.fixture
def run(lab: Path, capsys: pytest.CaptureFixture) -> Path:
    """A run submitted as job 41."""
    submit(lab)
    capsys.readouterr()
    return lab / "run"


@pytest.fixture
def status(run: Path, capsys: pytest.CaptureFixture):
    """Asks --status: returns the rows by name or, with --json, the object."""

    def ask(*flags: str) -> dict:
        main(["--status", str(run), *flags])
        text = capsys.readouterr().out
        if "--json" in flags:
            (found,) = json.loads(text, parse_constant=lambda word: pytest.fail(word))
            return found
        return dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines())

    return ask


def steps(*numbers: int) -> list[dict]:
    return [{"kind": "train", "step": n, "loss": 8.0 - n} for n in numbers]


def test_a_running_job(run, status, monkeypatch) -> None:
    lines = [json.dumps(line) for line in steps(*range(1, 8))]
    lines.insert(5, json.dumps({"kind": "save", "step": 5, "seconds": 70.0}))
    lines[3:3] = ['{"kind": "train", "st']  # truncated when the run was killed
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tra')
    (run / "run_status.txt").write_text("running\n")
    (run / "iter_0000005").mkdir()
    (run / "iter_0000009.partial").mkdir()
    monkeypatch.setenv("JOB", RUNNING)
    rows = status()
    assert rows["state"] == "running" and rows["step"].startswith("7 of 10, loss 1.0000, at ")
    assert rows["checkpoint"] == "step 5" and rows["at risk"].startswith("2 steps")
    assert rows["job 41"] == "RUNNING, on n[1-2], 01:00 of 02:00, restarted 3 times"
    assert rows["last save"] == "70.0 s: longer than the site file's SAVE_SECONDS=60; raise it"
    found = status("--json")
    assert (found["step"], found["steps_at_risk"], found["last_save_seconds"]) == (7, 2, 70.0)
    assert found["jobs"][0] | {"job": "41", "restarts": 3} == found["jobs"][0]


@pytest.mark.parametrize(
    "word,event,job,state",
    [
        (None, None, PENDING, "waiting"),
        ("running", "start", RUNNING, "running"),
        ("running", "start", SUSPENDED, "suspended"),
        ("running", "failed", PENDING, "waiting"),
        ("running", "failed", FAILED, "failed"),
        ("running", "given-up", "", "failed"),
        ("running", "start", FAILED, "interrupted"),
        ("running", "ended", "", "interrupted"),
        ("stopped", "stopped", FAILED, "stopped"),
        ("done", "done", "", "done"),
    ],
)
def test_the_state_is_that_of_run_and_job(run, status, monkeypatch, word, event, job, state) -> None:
    """A job that failed, or that SLURM no longer knows, is not running."""
    if word:
        (run / "run_status.txt").write_text(f"{word}\n")
    if event:
        (run / "slurm/starts.txt").write_text(f"41.0 0 {event} 2026-01-01T00:00:00+00:00 in words\n")
    monkeypatch.setenv("JOB", job)
    assert status()["state"] == state == status("--json")["state"]
    if not job:
        assert status()["jobs"] == "SLURM no longer knows 41"
        assert status("--json")["forgotten_jobs"] == ["41"]
    if event:
        assert status()["last event"] == "in words (job 41, 2026-01-01T00:00:00+00:00)"


def test_without_a_controller_only_the_files_are_shown(run, status, monkeypatch) -> None:
    """SLURM is asked once."""
    monkeypatch.setenv("SILENT", "yes")
    (run / "run_status.txt").write_text("running\n")
    log_steps(run, *steps(1, 2, 3))
    rows = status()
    assert (
        rows["state"] == "running" and rows["step"].startswith("3 of 10") and rows["at risk"].startswith("3 ")
    )
    assert rows["slurm"].endswith("Unable to contact slurm controller; only the run's files were read")
    assert (run.parent / "squeue").read_text() == "x\n"
    assert "Unable to contact" in status("--json")["slurm"]


def test_a_controller_that_hangs_is_not_waited_for(run, status, monkeypatch) -> None:
    (run.parent / "bin/squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr("megatron_mesh.slurm.status.STATUS_SECONDS", 0.2)
    assert "squeue did not answer within 0.2 s" in status()["slurm"]


def test_failed_saves_and_steps_at_risk(run, status) -> None:
    failed = [{"kind": "save_failed", "step": n, "reason": "No space left on device"} for n in (5, 10, 15)]
    saved = {"kind": "save", "step": 8, "seconds": 2.0}
    log_steps(run, failed[0], saved, *steps(9, 10), failed[1], *steps(15), failed[2], *steps(17))
    (run / "iter_0000008").mkdir()
    rows = status()
    assert rows["failed saves"] == "2 since then, at step 15: No space left on device"
    assert rows["at risk"] == "9 steps since the newest checkpoint" and rows["last save"] == "2.0 s"
    assert [each["step"] for each in status("--json")["failed_saves"]] == [10, 15]
    log_steps(run, *steps(17), failed[2], saved)
    assert "failed saves" not in status() and status()["step"].startswith("17 of 10")


def test_the_last_save_stays_after_a_mebibyte_of_steps(run, status) -> None:
    """Even if the record crosses the border of two blocks."""
    record = json.dumps(steps(20)[0] | {"text": "x" * 997}) + "\n"
    saved = '{"kind": "save", "step": 10, "seconds": 2.0}\n'
    (run / "metrics.jsonl").write_text(saved + record * 3000)
    assert status("--json")["last_save_seconds"] == 2.0
    (run / "iter_0000010").mkdir()
    (run / "metrics.jsonl").write_text("\n" + record * 3000)
    assert "last save" not in status() and status()["checkpoint"] == "step 10"
    assert status()["at risk"].startswith("10 steps")


def test_a_loss_that_is_not_finite(run, status) -> None:
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 3, "loss": NaN}\n')
    assert status("--json")["loss"] is None
    log_steps(run, {"kind": "train", "step": 3, "loss": None})
    assert "3 of 10, loss not finite" in status()["step"]


def test_a_run_submitted_by_hand(lab, capsys, monkeypatch) -> None:
    """Its state comes from starts.txt and the trainer's files."""
    run = lab / "by_hand"
    (run / "slurm").mkdir(parents=True)
    (run / "slurm/starts.txt").write_text("7_2.0 0 start 2026-01-01T00:00:00 on n1 from step 0\n")
    (run / "config.yaml").write_text("train_samples: 121\nglobal_batch_size: 4\n")
    (run / "run_status.txt").write_text("running\n")
    log_steps(run, *({**step, "consumed_samples": 2 * step["step"]} for step in steps(1, 2)))
    monkeypatch.setenv("JOB_7_2", RUNNING)
    main(["--status", str(run)])
    text = capsys.readouterr().out
    assert "job 7_2     RUNNING" in text and "2 of 31" in text and "2 steps since" in text
    main(["--requeue", str(run)])
    assert (lab / "scancel").read_text() == "--batch --signal=USR1 7_2\n"
    monkeypatch.setenv("JOB_7_2", FAILED)
    with pytest.raises(
        UserError, match=r"submit its script again with sbatch \(its earlier failures no longer"
    ):
        main(["--requeue", str(run)])
    assert (run / "slurm/starts.txt").read_text().endswith("from step 0\nby-hand -\n")


def test_several_runs_are_a_table(lab, capsys, monkeypatch) -> None:
    for name in ("a", "b"):
        submit(lab, "--save", str(lab / name))
    log_steps(lab / "b", *steps(6))
    monkeypatch.setenv("JOB_41", PENDING)
    monkeypatch.setenv("JOB_42", RUNNING)
    capsys.readouterr()
    main(["--status", str(lab / "a"), str(lab / "b")])
    head, *rows = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert head == ["run", "state", "step", "of", "loss", "checkpoint", "at risk", "jobs"]
    assert rows[0] == [str(lab / "a"), "waiting", "-", "10", "-", "-", "0", "41 PENDING"]
    assert rows[1] == [str(lab / "b"), "running", "6", "10", "2.0000", "-", "6", "42 RUNNING"]
    assert (lab / "squeue").read_text() == "x\n"  # one call for all runs
    main(["--status", str(lab / "a"), str(lab / "b"), "--json"])
    assert [each["state"] for each in json.loads(capsys.readouterr().out)] == ["waiting", "running"]


def test_status_shows_why_a_run_failed(run, status, monkeypatch) -> None:
    (run / "run_status.txt").write_text("failed\nrank 3 of 8 on host n2: no such file\n")
    monkeypatch.setenv("JOB", FAILED)
    assert (status()["state"], status()["cause"]) == ("failed", "rank 3 of 8 on host n2: no such file")


def test_the_exit_status_of_a_stopped_run_is_that_of_the_job_script(run, status, monkeypatch) -> None:
    script = (ROOT / "megatron_mesh/slurm/job.sh").read_text()
    assert f"readonly UNFINISHED={UNFINISHED}\n" in script
    monkeypatch.setenv("JOB", FAILED.replace("256", str(UNFINISHED << 8)))
    assert status()["job 41"] == "FAILED: ended before the end of the run (exit status 75)"


def test_requeue_saves_waits_or_submits(lab, run, capsys, monkeypatch) -> None:
    monkeypatch.setenv("JOB", RUNNING)
    main(["--requeue", str(run)])
    assert (lab / "scancel").read_text() == "--batch --signal=USR1 41\n"
    assert "job 41 will save and requeue itself; see --status" in capsys.readouterr().out
    monkeypatch.setenv("JOB", PENDING)
    main(["--requeue", str(run)])
    assert "is already in the queue (PENDING, Priority)" in capsys.readouterr().out
    for state in (FAILED, ""):
        monkeypatch.setenv("JOB", state)
        main(["--requeue", str(run)])
    assert (run / "slurm/jobs.txt").read_text().split() == ["41", "42", "43"]
    (run / "run_status.txt").write_text("done\n")
    with pytest.raises(UserError, match="trained to the end"):
        main(["--requeue", str(run)])


def test_requeue_of_a_chain_prints_what_resumes(lab, capsys, monkeypatch) -> None:
    submit(lab, "--chain", "2")
    monkeypatch.setenv("JOB_41", RUNNING)
    monkeypatch.setenv("JOB_42", PENDING)
    main(["--requeue", str(lab / "run")])
    assert "job 41 will save; the next job of the chain resumes" in capsys.readouterr().out
    monkeypatch.setenv("JOB_41", FAILED)
    monkeypatch.setenv("JOB_42", RUNNING)
    main(["--requeue", str(lab / "run")])
    assert "job 42 will save; it is the last of its chain, so run --requeue again" in capsys.readouterr().out


def test_an_unknown_state_counts_as_running_or_waiting(run, status, capsys, monkeypatch) -> None:
    """With an unknown state, such as SIGNALING, the run is not submitted a second time."""
    monkeypatch.setenv("JOB", RUNNING.replace("RUNNING", "SIGNALING"))
    assert status()["state"] == "running"
    main(["--requeue", str(run)])
    assert (run / "slurm/jobs.txt").read_text() == "41\n"
    capsys.readouterr()
    monkeypatch.setenv("JOB", PENDING.replace("PENDING", "SPECIAL_EXIT"))
    assert status()["state"] == "waiting"


def test_options_in_the_environment_do_not_hide_a_job(lab, run, status, monkeypatch) -> None:
    """SQUEUE_PARTITION=high would make squeue print nothing for a running job."""
    (lab / "bin/squeue").write_text(
        '#!/bin/sh\ncat\n[ -n "$SQUEUE_PARTITION$SCANCEL_BATCH$SINFO_ALL$SCONTROL_ALL" ] || '
        f"echo '41|{RUNNING}|41|'\n"
    )
    for name in ("SQUEUE_PARTITION", "SCANCEL_BATCH", "SINFO_ALL", "SCONTROL_ALL"):
        monkeypatch.setenv(name, "high")
    assert status()["state"] == "running"


def test_a_truncated_line_is_not_an_event(run, status) -> None:
    (run / "slurm/starts.txt").write_text(
        "41.0 10 start 2026-01-01T00:00:00 on n1\n41.0 1041.1 0 start 2026-01-01T00:00:00 on n1\n"
    )
    assert status("--json")["last_event"]["text"] == "on n1" and status("--json")["last_event"]["job"] == "41"


def test_a_relative_output_directory_is_the_job_s(lab, capsys, monkeypatch) -> None:
    """--status finds the metrics from any directory, and the time has a time zone."""
    monkeypatch.chdir(lab)
    submit(lab, "--output-dir", "logs")
    (lab / "logs").mkdir()
    log_steps(lab / "logs", *steps(3))
    monkeypatch.chdir("/")
    capsys.readouterr()
    for text in (
        f"output_dir: {lab}/logs\n",
        "output_dir: logs\n",
    ):  # an earlier version wrote the second form
        config = lab / "run/slurm/config.yaml"
        config.write_text(re.sub(r"output_dir: .*\n", text, config.read_text()))
        main(["--status", str(lab / "run"), "--json"])
        (found,) = json.loads(capsys.readouterr().out)
        assert found["step"] == 3 and datetime.fromisoformat(found["updated"]).tzinfo is not None


@pytest.mark.parametrize("command", ["--status", "--follow", "--cancel"])
def test_chain_goes_with_submissions(run, command) -> None:
    with pytest.raises(UserError, match=f"--chain is for a new run, not for {command}"):
        main([command, str(run), "--chain", "5"])


def test_a_suspended_job_is_called_suspended(run, monkeypatch) -> None:
    monkeypatch.setenv("JOB", SUSPENDED)
    with pytest.raises(UserError, match=r"job 41 is suspended .*scontrol resume 41"):
        main(["--requeue", str(run)])
    assert (run / "slurm/jobs.txt").read_text() == "41\n"


@pytest.mark.parametrize("state", ["CONFIGURING", "COMPLETING"])
def test_a_job_that_cannot_react_is_not_signalled(lab, run, monkeypatch, state) -> None:
    monkeypatch.setenv("JOB", RUNNING.replace("RUNNING", state))
    with pytest.raises(UserError, match=f"job 41 is {state}.*try again in a moment"):
        main(["--requeue", str(run)])
    assert not (lab / "scancel").exists()


def test_requeue_on_a_full_disk_submits_nothing(run, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "jobs.txt")

    monkeypatch.setattr("megatron_mesh.slurm.actions.record_jobs", full)
    with pytest.raises(UserError, match="No space left on device"):
        main(["--requeue", str(run)])
    assert (run.parent / "scancel").read_text() == "42\n"


def test_cancel_by_directory(lab, capsys, monkeypatch) -> None:
    """The last job of a chain first, so that none starts. Jobs that are over stay untouched."""
    submit(lab, "--chain", "3")
    monkeypatch.setenv("JOB", PENDING)
    monkeypatch.setenv("JOB_41", RUNNING)
    capsys.readouterr()
    main(["--cancel", str(lab / "run")])
    assert capsys.readouterr().out == "cancelled job 41 (RUNNING), job 42 (PENDING), job 43 (PENDING)\n"
    assert (lab / "scancel").read_text().split() == ["43", "42", "41"]
    monkeypatch.setenv("JOB", FAILED)
    monkeypatch.setenv("JOB_41", FAILED)
    main(["--cancel", str(lab / "run")])
    assert "has no job in the queue" in capsys.readouterr().out


def test_follow_prints_until_the_job_is_over(run, capsys, monkeypatch) -> None:
    monkeypatch.setattr("megatron_mesh.slurm.follow._ASK_SECONDS", 0.0)
    monkeypatch.setenv("JOB", PENDING)
    log = run / "slurm/41.log"
    log.write_text("".join(f"line {n}\n" for n in range(100)))
    pieces = follow(run, poll_seconds=0.01)
    assert next(pieces) == "".join(f"line {n}\n" for n in range(80, 100))
    with log.open("a") as file:
        file.write("größe\nhalf")
    assert next(pieces) == "größe\n"
    with log.open("a") as file:
        file.write(" a line\n")
    monkeypatch.setenv("JOB", FAILED)
    assert list(pieces) == ["half a line\n"]
    said = capsys.readouterr().err.splitlines()
    assert said == ["job 41: PENDING (Priority)", "job 41: FAILED"]


def test_follow_long_lines_and_the_last_one(run, monkeypatch) -> None:
    """A progress bar without newlines, and the last incomplete line of a killed job."""
    monkeypatch.setattr("megatron_mesh.slurm.follow._ASK_SECONDS", 0.0)
    monkeypatch.setenv("JOB", RUNNING)
    log = run / "slurm/41.log"
    lines = "".join(f"line {n}\n" for n in range(30_000))
    log.write_text(lines)
    pieces = follow(run, poll_seconds=0.01)
    assert next(pieces) == lines[lines.index("line 29980\n") :]
    with log.open("a") as file:
        file.write("x" * 200_000)
    assert len(next(pieces)) > 0
    monkeypatch.setenv("JOB", FAILED)
    assert set("".join(pieces)) == {"x"}
    log.write_text("")
    pieces = follow(run, poll_seconds=0.01)
    log.write_text("first\nkilled her")
    assert "".join(pieces) == "first\nkilled her"


def test_follow_a_job_submitted_by_hand(lab, capsys, monkeypatch) -> None:
    """SLURM knows the path of its log."""
    run = lab / "by_hand"
    (run / "slurm").mkdir(parents=True)
    (run / "slurm/starts.txt").write_text("7.0 0 start 2026-01-01T00:00:00 on n1 from step 0\n")
    (lab / "a log").write_text("all\n")
    said = f"JobId=7 StdIn=/dev/null StdOut={lab}/a log Power="
    (lab / "bin/scontrol").write_text(f'#!/bin/sh\necho "{said}"\n')
    monkeypatch.setenv("JOB", FAILED)
    main(["--follow", str(run)])
    assert capsys.readouterr().out == "all\n"


def test_follow_without_a_controller_ends_with_the_jobs_last_event(run, capsys, monkeypatch) -> None:
    monkeypatch.setattr("megatron_mesh.slurm.follow._ASK_SECONDS", 0.0)
    monkeypatch.setenv("SILENT", "yes")
    (run / "slurm/41.log").write_text("all\n")
    (run / "slurm/starts.txt").write_text("41.0 10 done 2026-01-01T00:00:00 trained to the end\n")
    main(["--follow", str(run)])
    captured = capsys.readouterr()
    assert captured.out == "all\n" and "Unable to contact" in captured.err


def test_run_directories_keep_their_links(lab) -> None:
    (lab / "link").symlink_to(lab)
    assert run_directory(lab / "link") == lab / "link"
    assert os.path.isabs(run_directory(Path("x")))
