"""Only one start of a run may write to it: job.sh and task.sh."""

import os
import signal
import subprocess
import time

import pytest

from tests.unit.slurm.job_script import CANCELLED, HOOK, SCRIPTS, ending


def test_an_element_that_crashed_restarts_beside_its_siblings(job, tmp_path) -> None:
    """It recognizes its own token, and does not take its siblings' jobs for its own."""
    element = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    job(ending("running", 137, 10), **element)
    ended = job(ending("running", 137, 20), **element, SLURM_RESTART_COUNT="1", QUEUE="RUNNING")
    assert "start on node1 from step 10" in ended.stdout
    ended = job(ending("done", 0), SLURM_JOB_ID="8", QUEUE="RUNNING")
    assert ended.returncode == 2 and "error: job 7_2 is running in" in ended.stdout


def test_a_running_job_keeps_its_run(job, tmp_path) -> None:
    """Even if SQUEUE_PARTITION in the submitting shell hides the running job from squeue."""
    job(ending("running", 137, 10), CANCELLED)  # killed, so its token is still there
    noted = (tmp_path / "run/slurm/starts.txt").read_text()
    other = {"SLURM_JOB_ID": "8", "HOOK": HOOK + "}", "SQUEUE_PARTITION": "high", "SCONTROL_ALL": "1"}
    ended = job(ending("done", 0), **other, QUEUE="RUNNING")
    assert ended.returncode == 2 and "error: job 7 is running in" in ended.stdout
    assert (tmp_path / "run/run_owner.txt").read_text() == "7.0\n"
    assert (tmp_path / "squeue-environment").read_text() == ""
    assert (tmp_path / "hook").read_text().split()[:2] == ["refused", "10"]
    assert (tmp_path / "run/slurm/starts.txt").read_text() == noted  # the file belongs to the running job


@pytest.mark.parametrize("known", ["", "PENDING", "COMPLETED"])
def test_an_owner_whose_counter_rises_is_alive(job, tmp_path, known) -> None:
    """squeue prints nothing for another cluster's job, or if the controller doesn't answer."""
    (tmp_path / "run").mkdir()
    owner = tmp_path / "run/run_owner.txt"
    owner.write_text("7.0\n{}\n000000000001\n")
    beat = f'printf "7.0\\n{{}}\\n000000000002\\n" >{owner}'
    ended = job(ending("done", 0), SLURM_JOB_ID="8", QUEUE=known, MEANWHILE=beat)
    assert ended.returncode == 2 and f"another start is running in {tmp_path}/run (7.0 {{}})" in ended.stdout
    assert owner.read_text().startswith("7.0\n") and not (tmp_path / "srun").exists()
    # An owner whose counter stays, or whose file disappears, has ended.
    for meanwhile in ("", f"rm {owner}"):
        ended = job(ending("done", 0), SLURM_JOB_ID="8", QUEUE=known, MEANWHILE=meanwhile)
        assert ended.returncode == 0 and "to see whether an earlier start" in ended.stdout
        (tmp_path / "run/run_status.txt").unlink()
        owner.write_text("7.0\n{}\n000000000001\n")


@pytest.mark.parametrize("number,known", [("7", ""), ("8", "NODE_FAIL")])
def test_ranks_on_a_lost_node_do_not_keep_the_run(job, tmp_path, number, known) -> None:
    """They may survive until they see the new token."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run_owner.txt").write_text("7.0\n{}\n000000000001\n")
    ended = job(ending("done", 0), SLURM_JOB_ID=number, SLURM_RESTART_COUNT="1", QUEUE=known)
    assert ended.returncode == 0 and "to see whether" not in ended.stdout
    assert "for remaining processes of 7.0 to end" in ended.stdout


def test_another_start_takes_over_the_decision(job, tmp_path) -> None:
    ended = job(f"echo 7.1 >$RUN/run_owner.txt\n{ending('stopped', 1, 10)}", HOOK=HOOK + "}")
    assert "another start has taken over" in ended.stdout
    assert not (tmp_path / "requeued").exists()
    assert (tmp_path / "run/run_owner.txt").read_text() == "7.1\n"
    assert (tmp_path / "hook").read_text().split()[0] == "refused"
    assert "refused" not in (tmp_path / "run/slurm/starts.txt").read_text()


def test_a_missing_owner_file_does_not_count_as_another_owner(job) -> None:
    ended = job(f"rm $RUN/run_owner.txt\n{ending('running', 137, 10)}")
    assert "failed with exit status 137; requeued" in ended.stdout


def test_the_fence_ends_a_task_with_all_that_it_started(tmp_path) -> None:
    owner = tmp_path / "owner"
    owner.write_text("7.0\n")
    # In a new session, since SLURM starts each task in its own process group.
    command = ["bash", str(SCRIPTS / "task.sh"), str(owner), "7.0", "bash", "-c", "sleep 60 & echo $!; wait"]
    task = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert task.stdout is not None
    child = int(task.stdout.readline())
    owner.write_text("7.1\n")
    assert task.wait(15) == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # until it is reaped
            os.kill(child, 0)
            time.sleep(0.1)


def test_the_fence_goes_with_its_task(tmp_path) -> None:
    (tmp_path / "owner").write_text("7.0\n")
    command = ["bash", str(SCRIPTS / "task.sh"), str(tmp_path / "owner"), "7.0", "bash", "-c", "exit 42"]
    assert subprocess.run(command, timeout=5, start_new_session=True).returncode == 42
