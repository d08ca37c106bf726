"""Fake SLURM commands, as scripts that come first in PATH."""

import os
import sys
from pathlib import Path

import pytest

from tests.unit.slurm.job_script import job as job  # a fixture

ROOT = Path(__file__).resolve().parents[3]
# JOB is squeue's answer for every job, JOB_41 for that one: state|reason|nodes|time|limit|restarts|wait
# status.
SLURM = {
    "sbatch": """\
echo "$@" >>"$LAB/sbatch"
env | grep -E '^(SLURM|SBATCH|SRUN)' >"$LAB/sbatch-environment"
[ -z "$REFUSE" ] || { echo "sbatch: $REFUSE" >&2; exit 1; }
echo $((40 + $(wc -l <"$LAB/sbatch")))""",
    "scancel": 'echo "$@" >>"$LAB/scancel"',
    "squeue": """\
echo x >>"$LAB/squeue"
[ -z "$SILENT" ] || { echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; }
while [ "$1" != -j ]; do shift; done
for job in $(tr , '\\n' <<<"$2" | sort -u); do
    name=JOB_$job line=
    [ -z "${!name-$JOB}" ] || echo "$job|${!name-$JOB}|$job|"
done""",
    "scontrol": """\
case "$*" in
    "show config") echo "KillWait                = 30 sec" ;;
    *partition*) echo "PartitionName=gpu Default=YES GraceTime=0" ;;
    *) echo "$@" >>"$LAB/scontrol" ;;
esac""",
}
RUNNING = "RUNNING|None|n[1-2]|01:00|02:00|3|0"
PENDING = "PENDING|Priority||0:00|02:00|0|0"
SUSPENDED = "SUSPENDED|None|n1|01:00|02:00|0|0"
FAILED = "FAILED|NonZeroExitCode|n1|01:00|02:00|0|256"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with fake SLURM commands, which log their arguments there, and a site file."""
    (tmp_path / "bin").mkdir()
    for name, text in SLURM.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("LAB", str(tmp_path))
    for name in ("REFUSE", "JOB", "SILENT"):
        monkeypatch.setenv(name, "")
    text = (ROOT / "examples/slurm/site.sh").read_text()
    text = text.replace("PYTHON=$HOME/megatron_mesh/.venv/bin/python", f"PYTHON={sys.executable}")
    (tmp_path / "site.sh").write_text(text)
    return tmp_path
