"""What job.sh does after each ending of a run, with commands of our own in place of SLURM's."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

UNFINISHED = 75
EXAMPLES = Path(__file__).resolve().parents[3] / "examples/slurm"

# JOB is the job's end as "scontrol show job" has it; "scontrol requeue" ends the batch script as SLURM does.
# SLURM's controller knows the job's number, element and restarts from the fixture, not from its environment.
COMMANDS = {
    "scontrol": """\
[ ! -e "$LAB/away" ] || { rm "$LAB/away"; exit 1; }
case $1 in
    show) echo node1 ;;
    -o) state=$JOB
        [ -e "$LAB/started" ] || state="JobState=RUNNING Restarts=$RESTARTS"
        [ "$KNOWN" = no ] || echo "JobId=$SLURM_JOB_ID $ELEMENT JobName=x $state" ;;
    requeue) echo "$2" >>"$LAB/requeued"; kill -TERM $PPID ;;
esac""",
    "squeue": 'echo "$QUEUE"; env | grep ^SQUEUE_ >"$LAB/squeue-environment"; eval "$MEANWHILE"',
    "sinfo": 'echo "$DOWN"',
    "sleep": "exec /bin/sleep 0.01",
    "srun": """\
touch "$LAB/started"
printf '%s\\n' "$@" >"$LAB/srun"
printf '%s\\n' "$MASTER_ADDR" "$MASTER_PORT" $RANK $WORLD_SIZE >"$LAB/rendezvous"
env | grep -E '^(SLURM|SRUN|SBATCH)_' | sort >"$LAB/environment"
. "$LAB/trainer"
""",
}
SITE = """\
ENVIRONMENT=${KIND:-venv}
PYTHON=python
CONTAINER=image
CONTAINER_MOUNTS=(/data)
prepare() { :; }
eval "$HOOK"
"""
RUNNING = "JobState=RUNNING Reason=None PreemptTime=None"


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs job.sh once. ``trainer``: what the ranks do, in bash, with $RUN; the rest are variables.

    What the controller says follows SLURM's variables, unless ``RESTARTS`` and ``ELEMENT`` say otherwise.
    """
    (tmp_path / "bin").mkdir()
    for name, text in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    (tmp_path / "site.sh").write_text(SITE)
    script = tmp_path / "job.sbatch"
    script.write_text(
        f"RUN={tmp_path}/run; CODE={tmp_path}/code; SITE={tmp_path}/site.sh; SETTINGS=(--config c.yaml)\n"
        f". {EXAMPLES}/job.sh\n"
    )

    def start(trainer: str, state: str = RUNNING, **variables: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "trainer").write_text(f"RUN={tmp_path}/run\n{trainer}\n")
        for name in ("requeued", "started"):
            (tmp_path / name).unlink(missing_ok=True)
        element = "ArrayJobId={SLURM_ARRAY_JOB_ID} ArrayTaskId={SLURM_ARRAY_TASK_ID}"
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "LAB": str(tmp_path),
            "JOB": state,
            "QUEUE": "",
            "DOWN": "",
            "HOOK": "",
            "KNOWN": "",
            "MEANWHILE": "",
            "RESTARTS": variables.get("SLURM_RESTART_COUNT", "0"),
            "ELEMENT": element.format_map(variables) if "SLURM_ARRAY_JOB_ID" in variables else "",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node1",
            **variables,
        }
        return subprocess.run(
            ["bash", str(script)], env=environment, capture_output=True, text=True, timeout=30, cwd=tmp_path
        )

    return start


def ending(status: str, code: int, saved: int | None = None) -> str:
    """A trainer that leaves this status and exit code, and perhaps a checkpoint."""
    checkpoint = "" if saved is None else f"mkdir -p $RUN/iter_{saved:07d}\n"
    return f"{checkpoint}echo {status} >$RUN/run_status.txt\nexit {code}"


TIME_IS_UP = "JobState=COMPLETING Reason=TimeLimit PreemptTime=None"
CANCELLED = "JobState=COMPLETING Reason=None PreemptTime=None"
HELD = "JobState=COMPLETING Reason=job_requeued_in_held_state Restarts=1"
PREEMPTED = "JobState=RUNNING Reason=None PreemptTime=2026-01-01T00:00:00"


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
        (ending("running", 1), "", 1, False, "the controller does not say why"),
        (ending("stopped", 42, 20), RUNNING, UNFINISHED, False, "stopped on request at step 20"),
        (ending("running", 137, 20), RUNNING, 1, True, "failed with exit status 137; requeued"),
        (ending("running", 137, 20), CANCELLED, 137, False, "ended by SLURM"),
        ("exit 2", RUNNING, 2, False, "the settings were refused; not requeued"),
        (ending("failed", 4), RUNNING, 4, False, "could not be saved; not requeued"),
        (ending("failed", 5, 20), RUNNING, 5, False, "the loss diverged; not requeued"),
    ],
)
def test_endings(job, tmp_path, trainer, state, code, requeued, said) -> None:
    """The exit status of a run that stopped early is no success to jobs that wait for it (SLURM, case 8)."""
    ended = job(trainer, state)
    assert said in ended.stdout
    assert ended.returncode == code
    assert (tmp_path / "requeued").exists() == requeued


def test_a_lost_node_is_named(job) -> None:
    """SLURM, case 17."""
    ended = job(ending("running", 1, 20), f"{CANCELLED} Restarts=1", DOWN="node2")
    assert "ended by SLURM at step 20: node node2 is down" in ended.stdout


def test_the_log_says_why_a_run_failed(job) -> None:
    trainer = 'printf "failed\\nrank 3 of 8 on host n2: no such file\\n" >$RUN/run_status.txt; exit 2'
    ended = job(trainer)
    assert "cause: rank 3 of 8 on host n2: no such file" in ended.stdout and ended.returncode == 2


def test_the_early_warning_stops_the_run_and_requeues(job, tmp_path) -> None:
    """The stop file comes again when a run that is just starting removes an old one."""
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
    # Before the restart's first save: it brought nothing.
    ended = job(crash, SLURM_RESTART_COUNT="1")
    assert ended.returncode == 1 and "the restart brought no new step" in ended.stdout
    assert not (tmp_path / "requeued").exists()
    # SLURM itself might start it again.
    ended = job(ending("done", 0), SLURM_RESTART_COUNT="2")
    assert ended.returncode == 1 and "given up: the run failed at step 0" in ended.stdout


def test_ranks_that_end_without_a_word_are_no_success(job) -> None:
    """Exit status 0 without "done" in run_status.txt."""
    assert "failed with exit status 0; requeued" in job("exit 0").stdout
    ended = job("exit 0", SLURM_RESTART_COUNT="1")
    assert ended.returncode == 1 and "this was the last one" in ended.stdout


def test_only_failures_of_its_own_count(job, tmp_path) -> None:
    """A queue that preempts during every start, and nodes that fail (SLURM, case 7)."""
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
    assert "the last one" in job(died, SLURM_RESTART_COUNT="10").stdout


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


def test_what_the_submitting_shell_had_is_not_the_job_s(job, tmp_path) -> None:
    job(ending("stopped", 42), MASTER_ADDR="elsewhere", MASTER_PORT="1", RANK="0", WORLD_SIZE="1")
    assert (tmp_path / "rendezvous").read_text().split() == ["node1"]


def test_a_controller_that_is_away_for_a_moment_ends_no_run(job, tmp_path) -> None:
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
    assert ended.returncode == 0 and "was trained to the end before" in ended.stdout
    assert not (tmp_path / "srun").exists() and not (tmp_path / "run/run_owner.txt").exists()
    assert " done " in (tmp_path / "run/slurm/starts.txt").read_text().splitlines()[-1]


def test_an_element_of_an_array_acts_on_itself(job, tmp_path) -> None:
    """The last element's SLURM_JOB_ID is the whole array's (SLURM, case 1)."""
    job(ending("running", 1, 10), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert (tmp_path / "requeued").read_text() == "7_2\n"
    assert (tmp_path / "run/slurm/starts.txt").read_text().startswith("7_2.0 0 start ")


def test_an_element_that_crashed_restarts_beside_its_siblings(job, tmp_path) -> None:
    """Its own token is no other job's, and its siblings' numbers are not its own."""
    element = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    job(ending("running", 137, 10), **element)
    ended = job(ending("running", 137, 20), **element, SLURM_RESTART_COUNT="1", QUEUE="RUNNING")
    assert "start on node1 from step 10" in ended.stdout
    ended = job(ending("done", 0), SLURM_JOB_ID="8", QUEUE="RUNNING")
    assert ended.returncode == 2 and "error: job 7_2 runs in" in ended.stdout


def test_a_heterogeneous_job_is_refused(job, tmp_path) -> None:
    ended = job(ending("done", 0), SLURM_HET_SIZE="2", ELEMENT="HetJobId=7 HetJobOffset=0", HOOK=HOOK + "}")
    assert ended.returncode == 2 and "a heterogeneous job (2 parts) cannot hold a run" in ended.stdout
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "hook").read_text().split() == ["refused", "0", str(tmp_path / "run"), "python"]


def test_array_restart_and_het_variables_of_an_outer_job(job, tmp_path) -> None:
    """sbatch by hand inside an element of an array: the job acts on itself, with its own count."""
    leaked = {"SLURM_ARRAY_JOB_ID": "3", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "1"}
    leaked |= {"SLURM_RESTART_COUNT": "4", "SLURM_HET_SIZE": "2"}
    job(ending("running", 1, 10), **leaked, ELEMENT="", RESTARTS="0")
    assert (tmp_path / "requeued").read_text() == "7\n"
    assert "7.0 0 start " in (tmp_path / "run/slurm/starts.txt").read_text()
    environment = (tmp_path / "environment").read_text()
    assert "SLURM_RESTART_COUNT=0\n" in environment
    assert "SLURM_ARRAY" not in environment and "SLURM_HET" not in environment
    # Without an answer the environment is all there is.
    ended = job(ending("running", 1, 20), **leaked | {"SLURM_HET_SIZE": ""}, KNOWN="no")
    assert " 3_1.4] start on node1" in ended.stdout


def test_variables_of_another_job_do_not_reach_srun(job, tmp_path) -> None:
    """Submitted inside srun or salloc, or with --export=NONE (SLURM, cases 4 and 5)."""
    own = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_HINT": "nomultithread"}
    own |= {"SLURM_DIST_PLANESIZE": "4", "SLURM_GPUS_PER_TASK": "1"}
    script = tmp_path / "job.sbatch"
    options = ["--ntasks-per-node=8", "--hint=nomultithread", "-m plane=4", "--gpus-per-task 1"]
    lines = "".join(f"#SBATCH {option}\n" for option in options)
    script.write_text(f"#!/usr/bin/env bash\n{lines}{script.read_text()}")
    leaked = {"SLURM_CPU_BIND": "quiet,cores", "SLURM_MEM_PER_CPU": "10", "SLURM_MEM_PER_NODE": "20"}
    leaked |= {"SLURM_EXPORT_ENV": "NONE", "SRUN_DEBUG": "3", "SBATCH_TIMELIMIT": "1"}
    said = job(ending("done", 0), **own, **leaked).stdout
    assert "another job" not in said and "not used" not in said

    def environment() -> dict[str, str]:
        lines = (tmp_path / "environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    assert own.items() <= environment().items() and not leaked.keys() & environment().keys()
    assert "--export=ALL\n/bin/bash\n" in (tmp_path / "srun").read_text()
    # The shell of salloc and of a batch script has no variable by which it can be told.
    leaked |= {"SLURM_DISTRIBUTION": "cyclic", "SLURM_GPUS": "1", "SLURM_THREADS_PER_CORE": "1"}
    script.write_text(script.read_text().replace("#SBATCH -m plane=4\n", "").replace("--hint=", "--comment="))
    (tmp_path / "run/run_status.txt").unlink()
    ended = job(ending("done", 0), **own, **leaked, SLURM_NTASKS="2", SLURM_NPROCS="2")
    assert "no #SBATCH line of this job's script sets them: " in ended.stdout
    del own["SLURM_HINT"], own["SLURM_DIST_PLANESIZE"]
    assert own.items() <= environment().items() and not leaked.keys() & environment().keys()
    assert "SLURM_HINT" not in environment() and "SLURM_HINT" in ended.stdout
    assert environment()["SLURM_NTASKS"] == environment()["SLURM_NPROCS"] == "16"
    leaked |= {"SLURM_SRUN_COMM_PORT": "1", "SLURM_STEP_ID": "0"}
    (tmp_path / "run/run_status.txt").unlink()
    ended = job(ending("done", 0), **own, **leaked)
    assert "submitted from inside another job" in ended.stdout and "SLURM_DISTRIBUTION" in ended.stdout
    assert not leaked.keys() & environment().keys()


HOOK = 'on_end_hook() { printf "%s\\n" "$@" "$PYTHON" >>"$LAB/hook"; '


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
def test_the_sites_hook_hears_of_each_end(job, tmp_path, trainer, state, code, event) -> None:
    """With state, step and RUN, and what else stands in the site file; --status reads the same word."""
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


def test_a_stop_before_the_start_does_not_speak_of_saving(job, tmp_path) -> None:
    """SLURM, case 18."""
    ended = job(ending("done", 0), HOOK="prepare() { kill -USR1 $$; }")
    assert "asked to stop before the start; there is nothing to save" in ended.stdout
    assert "stopped before the start; requeued" in ended.stdout and not (tmp_path / "srun").exists()


def test_a_running_job_keeps_its_run(job, tmp_path) -> None:
    """Also if the shell that submitted this one had chosen another partition for squeue."""
    job(ending("running", 137, 10), CANCELLED)  # killed, so its token stays
    noted = (tmp_path / "run/slurm/starts.txt").read_text()
    other = {"SLURM_JOB_ID": "8", "HOOK": HOOK + "}", "SQUEUE_PARTITION": "high", "SCONTROL_ALL": "1"}
    ended = job(ending("done", 0), **other, QUEUE="RUNNING")
    assert ended.returncode == 2 and "error: job 7 runs in" in ended.stdout
    assert (tmp_path / "run/run_owner.txt").read_text() == "7.0\n"
    assert (tmp_path / "squeue-environment").read_text() == ""
    assert (tmp_path / "hook").read_text().split()[:2] == ["refused", "10"]
    assert (tmp_path / "run/slurm/starts.txt").read_text() == noted  # the other's file


@pytest.mark.parametrize("known", ["", "PENDING", "COMPLETED"])
def test_an_owner_whose_counter_rises_is_not_dead(job, tmp_path, known) -> None:
    """squeue prints nothing for a job of another cluster, or if the controller is away."""
    (tmp_path / "run").mkdir()
    owner = tmp_path / "run/run_owner.txt"
    owner.write_text("7.0\n{}\n000000000001\n")
    beat = f'printf "7.0\\n{{}}\\n000000000002\\n" >{owner}'
    ended = job(ending("done", 0), SLURM_JOB_ID="8", QUEUE=known, MEANWHILE=beat)
    assert ended.returncode == 2 and f"another start runs in {tmp_path}/run (7.0 {{}})" in ended.stdout
    assert owner.read_text().startswith("7.0\n") and not (tmp_path / "srun").exists()
    ended = job(ending("done", 0), SLURM_JOB_ID="8", QUEUE=known)
    assert ended.returncode == 0 and "to see whether the earlier start" in ended.stdout


@pytest.mark.parametrize("number,known", [("7", ""), ("8", "NODE_FAIL")])
def test_ranks_on_a_lost_node_do_not_keep_the_run(job, tmp_path, number, known) -> None:
    """They may live on, and end when they see the new token."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run_owner.txt").write_text("7.0\n{}\n000000000001\n")
    ended = job(ending("done", 0), SLURM_JOB_ID=number, SLURM_RESTART_COUNT="1", QUEUE=known)
    assert ended.returncode == 0 and "to see whether" not in ended.stdout
    assert "for what may be left of 7.0 to end" in ended.stdout


def test_a_job_submitted_again_by_hand_counts_failures_anew(job, tmp_path) -> None:
    """Settings refused twice, then mended: a new job starts, and a chain's next job does not."""
    for number in ("7", "8"):
        assert job("exit 2", SLURM_JOB_ID=number, REQUEUE="no").returncode == 2
    ended = job(ending("done", 0), SLURM_JOB_ID="9", REQUEUE="no")
    assert ended.returncode == 1 and "given up" in ended.stdout
    ended = job(ending("done", 0), SLURM_JOB_ID="10")
    assert ended.returncode == 0 and "trained to the end" in ended.stdout


def test_another_start_takes_over_the_decision(job, tmp_path) -> None:
    ended = job(f"echo 7.1 >$RUN/run_owner.txt\n{ending('stopped', 1, 10)}", HOOK=HOOK + "}")
    assert "another start has taken over" in ended.stdout
    assert not (tmp_path / "requeued").exists()
    assert (tmp_path / "run/run_owner.txt").read_text() == "7.1\n"
    assert (tmp_path / "hook").read_text().split()[0] == "refused"
    assert "refused" not in (tmp_path / "run/slurm/starts.txt").read_text()


def test_an_owner_file_that_is_gone_is_nobody_s(job) -> None:
    ended = job(f"rm $RUN/run_owner.txt\n{ending('running', 137, 10)}")
    assert "failed with exit status 137; requeued" in ended.stdout


def test_a_wrong_environment_is_a_noted_failure(job, tmp_path) -> None:
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


def test_the_fence_ends_a_task_with_all_that_it_started(tmp_path) -> None:
    owner = tmp_path / "owner"
    owner.write_text("7.0\n")
    # In a session of its own, as SLURM starts tasks in a process group of their own.
    command = ["bash", str(EXAMPLES / "task.sh"), str(owner), "7.0", "bash", "-c", "sleep 60 & echo $!; wait"]
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
    command = ["bash", str(EXAMPLES / "task.sh"), str(tmp_path / "owner"), "7.0", "bash", "-c", "exit 42"]
    assert subprocess.run(command, timeout=5, start_new_session=True).returncode == 42
