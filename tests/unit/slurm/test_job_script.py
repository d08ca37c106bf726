"""What job.sh does after each way in which a run can end, with fake SLURM commands."""

import pytest

from tests.unit.slurm.job_script import CANCELLED, HELD, HOOK, PREEMPTED, RUNNING, TIME_IS_UP, ending

UNFINISHED = 75


@pytest.mark.parametrize(
    "trainer,state,code,requeued,said",
    [
        (ending("done", 0, 20), RUNNING, 0, False, "trained to the end"),
        (ending("stopped", 42, 20), TIME_IS_UP, 1, True, "time is up; requeued, to resume from step 20"),
        (ending("running", 137), TIME_IS_UP, 1, True, "from step 0"),
        (ending("stopped", 42, 20), PREEMPTED, 1, True, "preempted; requeued"),
        (ending("running", 143, 20), PREEMPTED, 1, True, "preempted; requeued"),
        (ending("stopped", 42, 20), CANCELLED, 42, False, "ended by SLURM at step 20: cancelled"),
        (ending("running", 1), f"{CANCELLED} Restarts=1", 1, False, "step 0: preempted or requeued"),
        (ending("running", 1), HELD, 1, False, "ended by SLURM at step 0: requeued and held"),
        (ending("running", 9), "JobState=OUT_OF_MEMORY Reason=None", 9, False, "0: out of memory"),
        (ending("running", 1), "", 1, False, "controller gives no reason"),
        (ending("stopped", 42, 20), RUNNING, UNFINISHED, False, "stopped on request at step 20"),
        (ending("running", 137, 20), RUNNING, 1, True, "failed with exit status 137; requeued"),
        (ending("running", 137, 20), CANCELLED, 137, False, "ended by SLURM"),
        ("exit 2", RUNNING, 2, False, "the settings were refused; not requeued"),
        (ending("failed", 4), RUNNING, 4, False, "could not be saved; not requeued"),
        (ending("failed", 5, 20), RUNNING, 5, False, "the loss diverged; not requeued"),
    ],
)
def test_endings(job, tmp_path, trainer, state, code, requeued, said) -> None:
    """A run that stopped early has an exit status other than 0, so that dependent jobs don't start."""
    ended = job(trainer, state)
    assert said in ended.stdout
    assert ended.returncode == code
    assert (tmp_path / "requeued").exists() == requeued


def test_a_lost_node_is_named(job) -> None:
    ended = job(ending("running", 1, 20), f"{CANCELLED} Restarts=1", DOWN="node2")
    assert "ended by SLURM at step 20: node node2 is down" in ended.stdout


def test_the_log_says_why_a_run_failed(job) -> None:
    trainer = 'printf "failed\\nrank 3 of 8 on host n2: no such file\\n" >$RUN/run_status.txt; exit 2'
    ended = job(trainer)
    assert "cause: rank 3 of 8 on host n2: no such file" in ended.stdout and ended.returncode == 2


def test_the_early_warning_stops_the_run_and_requeues(job, tmp_path) -> None:
    """The stop file is written again if a starting run removes it."""
    trainer = """\
kill -USR1 $PPID
until [ -e $RUN/stop ]; do /bin/sleep 0.05; done
rm $RUN/stop
until [ -e $RUN/stop ]; do /bin/sleep 0.05; done
mkdir $RUN/iter_0000008
echo stopped >$RUN/run_status.txt
exit 42"""
    ended = job(trainer)
    assert "asked to stop; the ranks save" in ended.stdout and "stopped early; requeued" in ended.stdout
    assert (tmp_path / "requeued").read_text() == "7\n"


def test_it_stops_when_a_restart_brings_no_new_step(job, tmp_path) -> None:
    crash = "echo running >$RUN/run_status.txt; exit 1"
    assert "requeued, to resume from step 0" in job(crash).stdout
    # The restart fails before its first save.
    ended = job(crash, SLURM_RESTART_COUNT="1")
    assert ended.returncode == 1 and "the restart brought no new step" in ended.stdout
    assert not (tmp_path / "requeued").exists()
    # SLURM itself restarts the job.
    ended = job(ending("done", 0), SLURM_RESTART_COUNT="2")
    assert ended.returncode == 1 and "given up after repeated failures at step 0" in ended.stdout


def test_exit_status_0_without_done_is_a_failure(job) -> None:
    """If run_status.txt doesn't say "done", the run is not complete."""
    assert "failed with exit status 0; requeued" in job("exit 0").stdout
    ended = job("exit 0", SLURM_RESTART_COUNT="1")
    assert ended.returncode == 1 and "given up, because" in ended.stdout


def test_only_failures_of_its_own_count(job, tmp_path) -> None:
    """Preemptions and lost nodes do not, however many there are."""
    died = "echo running >$RUN/run_status.txt; exit 143"
    for restart, state in enumerate([PREEMPTED, CANCELLED, TIME_IS_UP] * 2):
        assert job(died, state, SLURM_RESTART_COUNT=str(restart)).returncode in (1, 143)
    assert "failed with exit status 143; requeued" in job(died, SLURM_RESTART_COUNT="6").stdout
    assert "preempted; requeued" in job(died, PREEMPTED, SLURM_RESTART_COUNT="7").stdout
    ended = job(died, SLURM_RESTART_COUNT="8", FAILURES_PER_STEP="3")
    assert "failed with exit status 143; requeued" in ended.stdout
    with (tmp_path / "run/slurm/starts.txt").open("a") as file:
        file.write("by-hand -\n")  # --requeue
    assert "requeued" in job(died, SLURM_RESTART_COUNT="9").stdout
    assert "given up, because" in job(died, SLURM_RESTART_COUNT="10").stdout


def test_new_steps_are_worth_another_start(job) -> None:
    for restart in range(5):
        ended = job(ending("running", 1, 10 * (restart + 1)), SLURM_RESTART_COUNT=str(restart))
        assert f"requeued, to resume from step {10 * (restart + 1)}" in ended.stdout


def test_a_later_start_resumes(job, tmp_path) -> None:
    job(ending("stopped", 42))
    first = (tmp_path / "srun").read_text().split()
    assert first[-2:] == ["--load", str(tmp_path / "run")] and f"{tmp_path}/code/pretrain_mesh.py" in first
    job(ending("stopped", 42, 10), SLURM_RESTART_COUNT="1", LOAD="/other")
    assert (tmp_path / "rendezvous").read_text().split() == ["node1"]  # the ranks choose the port
    job(ending("stopped", 42), SLURM_RESTART_COUNT="2", LOAD="/other")
    assert (tmp_path / "srun").read_text().split()[-3:] == ["--load", str(tmp_path / "run"), "--no-finetune"]


def test_a_controller_that_fails_for_a_moment_does_not_end_the_run(job, tmp_path) -> None:
    ended = job(f"touch {tmp_path}/away\n{ending('running', 137, 20)}")
    assert "failed with exit status 137; requeued" in ended.stdout and (tmp_path / "requeued").exists()


def test_a_first_start_takes_the_given_checkpoint(job, tmp_path) -> None:
    job(ending("stopped", 42), LOAD="/other")
    assert (tmp_path / "srun").read_text().split()[-2:] == ["--load", "/other"]


def test_the_log_names_where_a_start_begins(job) -> None:
    assert (
        "start on node1 from the checkpoint in /other\n" in job(ending("stopped", 42), LOAD="/other").stdout
    )
    assert "start on node1 from step 0\n" in job(ending("stopped", 42, 10)).stdout
    assert "start on node1 from step 10\n" in job(ending("stopped", 42), LOAD="/other").stdout


def test_a_chain_resumes_in_its_next_job(job, tmp_path) -> None:
    ended = job(ending("stopped", 42, 10), TIME_IS_UP, REQUEUE="no")
    assert ended.returncode == UNFINISHED and "the next job of the chain resumes from step 10" in ended.stdout
    assert not (tmp_path / "requeued").exists()
    job(ending("done", 0), SLURM_JOB_ID="8")
    (tmp_path / "srun").unlink()
    ended = job(ending("done", 0), SLURM_JOB_ID="9")
    assert ended.returncode == 0 and "already trained to the end" in ended.stdout
    assert not (tmp_path / "srun").exists() and not (tmp_path / "run/run_owner.txt").exists()
    assert " done " in (tmp_path / "run/slurm/starts.txt").read_text().splitlines()[-1]


@pytest.mark.parametrize(
    "trainer,state,code,event",
    [
        (ending("done", 0, 20), RUNNING, 0, "done"),
        (ending("stopped", 42, 20), RUNNING, UNFINISHED, "stopped"),
        (ending("stopped", 42, 20), TIME_IS_UP, 1, "resumes"),
        (ending("stopped", 42, 20), CANCELLED, 42, "ended"),
        (ending("failed", 5, 20), RUNNING, 5, "failed"),
    ],
)
def test_the_site_s_hook_is_called_at_each_end(job, tmp_path, trainer, state, code, event) -> None:
    """It gets event, step and RUN, and sees the site file's variables. --status reads the same event."""
    assert job(trainer, state, HOOK=HOOK + "}").returncode == code
    assert (tmp_path / "hook").read_text().split() == [event, "20", str(tmp_path / "run"), "python"]
    token, step, noted, *_ = (tmp_path / "run/slurm/starts.txt").read_text().splitlines()[-1].split()
    assert (token, step, noted) == ("7.0", "20", event)


@pytest.mark.parametrize("fault,said", [("exit 3", "exit status 3"), ("/bin/sleep 60", "exit status 137")])
def test_a_hook_that_fails_or_hangs_changes_nothing(job, tmp_path, fault, said) -> None:
    ended = job(ending("stopped", 42, 20), TIME_IS_UP, HOOK=HOOK + fault + "; }", HOOK_SECONDS="0.2")
    assert ended.returncode == 1 and f"on_end_hook failed with {said}" in ended.stdout
    assert (tmp_path / "requeued").exists() and (tmp_path / "hook").exists()
    ended = job(ending("done", 0), HOOK=HOOK + fault + "; }", HOOK_SECONDS="0.2", SLURM_RESTART_COUNT="1")
    assert ended.returncode == 0


def test_a_stop_before_the_start_does_not_announce_a_save(job, tmp_path) -> None:
    ended = job(ending("done", 0), HOOK="prepare() { kill -USR1 $$; }")
    assert "asked to stop before the start; there is nothing to save" in ended.stdout
    assert "stopped before the start; requeued" in ended.stdout and not (tmp_path / "srun").exists()


def test_a_job_submitted_again_by_hand_counts_failures_anew(job, tmp_path) -> None:
    """Settings are refused twice, then corrected: a new job starts, but a chain's next job doesn't."""
    for number in ("7", "8"):
        assert job("exit 2", SLURM_JOB_ID=number, REQUEUE="no").returncode == 2
    ended = job(ending("done", 0), SLURM_JOB_ID="9", REQUEUE="no")
    assert ended.returncode == 1 and "given up" in ended.stdout
    ended = job(ending("done", 0), SLURM_JOB_ID="10")
    assert ended.returncode == 0 and "trained to the end" in ended.stdout


def test_a_wrong_environment_is_recorded_as_a_failure(job, tmp_path) -> None:
    ended = job(ending("done", 0), KIND="conda", HOOK=HOOK + "}")
    assert ended.returncode == 2 and "must be venv, pyxis or apptainer" in ended.stdout
    assert (tmp_path / "hook").read_text().split()[0] == "failed"
    assert " failed " in (tmp_path / "run/slurm/starts.txt").read_text().splitlines()[-1]


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_containers(job, tmp_path, kind) -> None:
    job(ending("done", 0), KIND=kind)
    words = (tmp_path / "srun").read_text().split("\n")
    run = tmp_path / "run"
    if kind == "pyxis":
        assert "--container-image=image" in words
        (mounts,) = [word for word in words if word.startswith("--container-mounts=")]
        assert words.index(mounts) < words.index("/bin/bash")
    else:
        place = words.index("apptainer")
        assert words.index("/bin/bash") < place < words.index("python")
        mounts = words[words.index("--bind") + 1]
    assert f"{run}:{run}" in mounts and "/data:/data" in mounts
