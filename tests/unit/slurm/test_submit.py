"""tools/submit_slurm.py: what it writes, submits, reports and refuses; scripts play SLURM's commands."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mesh.arguments import parse_args
from megatron_mesh.config.checks import resolve
from megatron_mesh.errors import UserError
from megatron_mesh.slurm.site import seconds_of

ROOT = Path(__file__).resolve().parents[3]
main = runpy.run_path(str(ROOT / "tools/submit_slurm.py"))["main"]
MODEL = ["--layers", "1+1R2+1", "--hidden-size", "32", "--num-attention-heads", "2", "--seq-length", "16"]
MODEL += ["--vocab-size", "128", "--train-iters", "10", "--lr-warmup-iters", "1"]
DATA = ["--data-path", "/data/corpus_text_document"]
SAVING = ["--save-interval", "5"]
SLURM = {
    "sbatch": 'echo "$@" >>"$LAB/sbatch"; [ -z "$REFUSE" ] || { echo "sbatch: $REFUSE" >&2; exit 1; }\n'
    'echo $((40 + $(wc -l <"$LAB/sbatch")))',
    "scancel": 'echo "$@" >>"$LAB/scancel"',
    "scontrol": """\
case "$*" in
    "show config") echo "KillWait                = 30 sec" ;;
    *partition*) echo "PartitionName=gpu Default=YES GraceTime=0" ;;
    *) [ -n "$JOB" ] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
       echo "JobId=41 $JOB" ;;
esac""",
}


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands that answer as SLURM's do and note what they are asked; a site file."""
    (tmp_path / "bin").mkdir()
    for name, text in SLURM.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("LAB", str(tmp_path))
    for name in ("REFUSE", "JOB"):
        monkeypatch.setenv(name, "")
    text = (ROOT / "examples/slurm/site.sh").read_text()
    text = text.replace("PYTHON=$HOME/megatron_mesh/.venv/bin/python", f"PYTHON={sys.executable}")
    (tmp_path / "site.sh").write_text(text)
    return tmp_path


def submit(lab: Path, *flags: str) -> None:
    main(["--site", str(lab / "site.sh"), "--save", str(lab / "run"), *MODEL, *DATA, *SAVING, *flags])


def test_what_is_submitted_starts_from_the_snapshot(lab, capsys) -> None:
    submit(lab, "--nodes", "2")
    assert "submitted job 41" in capsys.readouterr().out
    files = lab / "run/slurm"
    assert (lab / "sbatch").read_text() == f"--parsable {files}/job.sbatch\n"
    script = (files / "job.sbatch").read_text()
    for option in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "signal=B:USR1@180", "partition=gpu"):
        assert f"#SBATCH --{option}\n" in script
    assert "#SBATCH --requeue\n" in script and "#SBATCH --open-mode=append\n" in script
    assert subprocess.run(["bash", "-n", str(files / "job.sbatch")]).returncode == 0
    config = resolve(parse_args(["--config", str(files / "config.yaml")]).config, world_size=16)
    assert config.checkpoint.save == str(lab / "run") and config.training.global_batch_size == 16
    # The program there finds the package there.
    command = [sys.executable, "-v", str(files / "code/pretrain_mesh.py"), "--hiden-size"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert f"{files}/code/megatron_mesh/arguments.py" in ended.stderr
    assert f"{ROOT}/megatron_mesh/arguments.py" not in ended.stderr


def test_a_dry_run_only_prints(lab, capsys) -> None:
    submit(lab, "--dry-run", "--time", "1-12", "--gpus-per-node", "4", "--load", "/other/run")
    script = capsys.readouterr().out
    assert "#SBATCH --time=1-12\n" in script and "#SBATCH --ntasks-per-node=4\n" in script
    assert "LOAD=/other/run\n" in script
    assert not (lab / "run").exists() and not (lab / "sbatch").exists()


def test_a_chain_waits_job_for_job(lab, capsys) -> None:
    submit(lab, "--chain", "3")
    assert "submitted job 41, 42, 43" in capsys.readouterr().out
    asked = (lab / "sbatch").read_text().splitlines()
    assert ["afterany:41" in line for line in asked] == [False, True, False]
    assert "afterany:42" in asked[2]
    assert "REQUEUE=no" in (lab / "run/slurm/job.sbatch").read_text()


def test_a_refused_submission_can_be_tried_again(lab, monkeypatch) -> None:
    monkeypatch.setenv("REFUSE", "error: invalid partition specified: gpu")
    with pytest.raises(UserError, match="invalid partition"):
        submit(lab)
    monkeypatch.setenv("REFUSE", "")
    submit(lab)
    with pytest.raises(UserError, match="was submitted before"):
        submit(lab)


def test_a_save_longer_than_slurm_waits_is_told(lab, capsys) -> None:
    submit(lab)
    assert "a save takes up to 60 s, and SLURM leaves 30 s (KillWait)" in capsys.readouterr().err


def test_status_of_a_running_job(lab, capsys, monkeypatch) -> None:
    submit(lab)
    run = lab / "run"
    lines = [{"kind": "train", "step": n, "loss": 8.0 - n} for n in range(1, 8)]
    lines.insert(5, {"kind": "save", "step": 5, "seconds": 70.0})
    texts = [json.dumps(line) for line in lines]
    texts[3:3] = ['{"kind": "train", "st']  # where the run was killed
    (run / "metrics.jsonl").write_text("\n".join(texts) + '\n{"kind": "tra')
    (run / "run_status.txt").write_text("running\n")
    (run / "iter_0000005").mkdir()
    monkeypatch.setenv(
        "JOB", "JobState=RUNNING Reason=None NodeList=n[1-2] RunTime=01:00 TimeLimit=02:00 Restarts=3"
    )
    capsys.readouterr()
    main(["--status", str(run)])
    text = capsys.readouterr().out
    assert "7 of 10, loss 1.0000" in text and "checkpoint  step 5\n" in text
    assert "RUNNING, on n[1-2], 01:00 of 02:00, restarted 3 times" in text
    assert "70.0 s: more than the site file's SAVE_SECONDS=60" in text


def test_status_says_why_a_run_failed(lab, capsys, monkeypatch) -> None:
    submit(lab)
    (lab / "run" / "run_status.txt").write_text("failed\nrank 3 of 8 on host n2: no such file\n")
    monkeypatch.setenv("JOB", "JobState=FAILED Reason=NonZeroExitCode")
    capsys.readouterr()
    main(["--status", str(lab / "run")])
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["state", "failed"] in rows
    assert ["cause", "rank 3 of 8 on host n2: no such file"] in rows


def test_requeue_saves_waits_or_submits(lab, capsys, monkeypatch) -> None:
    submit(lab)
    run = str(lab / "run")
    monkeypatch.setenv("JOB", "JobState=RUNNING Reason=None")
    main(["--requeue", run])
    assert (lab / "scancel").read_text() == "--batch --signal=USR1 41\n"
    monkeypatch.setenv("JOB", "JobState=PENDING Reason=BeginTime")
    main(["--requeue", run])
    assert "in the queue already (PENDING, BeginTime)" in capsys.readouterr().out
    for state in ("JobState=FAILED Reason=NonZeroExitCode", ""):
        monkeypatch.setenv("JOB", state)
        main(["--requeue", run])
    assert (lab / "run/slurm/jobs.txt").read_text().split() == ["41", "42", "43"]
    (lab / "run/run_status.txt").write_text("done\n")
    with pytest.raises(UserError, match="trained to the end"):
        main(["--requeue", run])


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--nodes", "0"], "--nodes 0 must be above 0"),
        (["--chain", "0"], "--chain 0 must be above 0"),
        (["--tensor-model-parallel-size", "3"], "3"),
        (["--gpu-memory-gib", "0.0001"], "GiB of 0.0001"),
        (["--time", "2"], "used up by the early warning"),
        (["--time", "soon"], "no time of SLURM's"),
        (["--site", "no_such_file"], "no_such_file is no file"),
        (["--save", "a dir"], "rename it"),
        (["--finetune"], "--load"),
        (["--hiden-size", "3"], "did you mean --hidden-size"),
    ],
)
def test_bad_input_writes_nothing(lab, flags, message) -> None:
    with pytest.raises(UserError, match=message):
        submit(lab, *flags)
    assert not (lab / "run").exists() and not (lab / "sbatch").exists()


def test_a_run_needs_its_directory_and_checkpoints(lab) -> None:
    site = ["--site", str(lab / "site.sh"), *MODEL]
    with pytest.raises(UserError, match="--save is missing"):
        main([*site, *SAVING])
    with pytest.raises(UserError, match="without training data"):
        main([*site, *SAVING, "--save", str(lab / "run")])
    with pytest.raises(UserError, match="--save-interval is not set"):
        main([*site, *DATA, "--save", str(lab / "run")])
    with pytest.raises(UserError, match="--site is missing"):
        main(MODEL)
    with pytest.raises(UserError, match="was not submitted"):
        main(["--status", str(lab)])


@pytest.mark.parametrize(
    "change,message",
    [
        ("ENVIRONMENT=conda", "one of venv, pyxis, apptainer"),
        ("ENVIRONMENT=pyxis", "CONTAINER is not set"),
        ("SAVE_SECONDS=a", "SAVE_SECONDS=a must be a whole number"),
        ("GPUS_PER_NODE=", "GPUS_PER_NODE is not set"),
        ("PYTHON=/no/python", "cannot be run"),
        ("if", "bash cannot read it"),
    ],
)
def test_a_wrong_site_file(lab, change, message) -> None:
    with (lab / "site.sh").open("a") as file:
        file.write(f"\n{change}\n")
    with pytest.raises(UserError, match=message):
        submit(lab)


def test_errors_are_one_line(lab) -> None:
    command = [sys.executable, str(ROOT / "tools/submit_slurm.py"), "--status", str(lab)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("name,nodes", [("one_node", 1), ("many_nodes", 4)])
def test_the_examples_are_what_the_tool_writes(lab, capsys, name, nodes) -> None:
    """The same options, and settings that it takes."""
    text = (ROOT / f"examples/slurm/{name}.sbatch").read_text()
    settings = (
        text.split("SETTINGS=(")[1].split("\n)")[0].replace('"', "").replace("$CODE", str(ROOT)).split()
    )
    settings += ["--save", str(lab / "run"), "--vocab-size", "50304"]
    site = ["--site", str(lab / "site.sh"), "--nodes", str(nodes), "--gpu-memory-gib", "76"]
    main([*site, *settings, "--dry-run"])
    script = capsys.readouterr().out

    def options(script: str) -> set[str]:
        lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
        return {line for line in lines if not re.search("--(job-name|output|chdir)=", line)}

    assert options(text) == options(script)


@pytest.mark.parametrize(
    "text,seconds",
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("1-12", 129600), ("2-1:30", 178200), ("0-0:0:5", 5)],
)
def test_times_are_read_as_slurm_reads_them(text, seconds) -> None:
    assert seconds_of(text) == seconds
