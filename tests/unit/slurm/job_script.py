"""Runs job.sh with fake SLURM commands."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "megatron_mesh/slurm"

# JOB is the answer of "scontrol show job" at the end of the job. "scontrol requeue" ends the batch script as
# SLURM does. The fake controller gets the job's number, element and restarts from the fixture, not from the
# job's environment.
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
    """Runs job.sh once. ``trainer`` is bash code in place of the ranks; ``variables`` go to the environment.

    The controller's answers follow SLURM's variables, unless ``RESTARTS`` and ``ELEMENT`` are given.
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
        f". {SCRIPTS}/job.sh\n"
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
    """A trainer that leaves this run status, exit code and, with ``saved``, checkpoint."""
    checkpoint = "" if saved is None else f"mkdir -p $RUN/iter_{saved:07d}\n"
    return f"{checkpoint}echo {status} >$RUN/run_status.txt\nexit {code}"


TIME_IS_UP = "JobState=COMPLETING Reason=TimeLimit PreemptTime=None"
CANCELLED = "JobState=COMPLETING Reason=None PreemptTime=None"
HELD = "JobState=COMPLETING Reason=job_requeued_in_held_state Restarts=1"
PREEMPTED = "JobState=RUNNING Reason=None PreemptTime=2026-01-01T00:00:00"
HOOK = 'on_end_hook() { printf "%s\\n" "$@" "$PYTHON" >>"$LAB/hook"; '
