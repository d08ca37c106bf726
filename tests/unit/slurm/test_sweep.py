"""tools/submit_slurm.py --sweep, with fake SLURM commands."""

import subprocess

import pytest

from megatron_mesh.config.settings import read_yaml
from megatron_mesh.errors import UserError
from tests.unit.slurm.conftest import FAILED, PENDING, RUNNING, SUSPENDED
from tests.unit.slurm.tool import main, submit


def test_one_array_with_a_run_for_each_combination(lab, capsys, monkeypatch) -> None:
    """Each element is a run like any other, and all share one copy of the code."""
    flags = ["--sweep", "seed=1,2", "--sweep", "untie-embeddings-and-output-weights=true,false"]
    submit(lab, *flags, "--at-once", "3")
    top = lab / "run"
    assert (lab / "sbatch").read_text() == f"--parsable {top}/slurm/array.sbatch\n"
    script = (top / "slurm/array.sbatch").read_text()
    assert "#SBATCH --array=0-3%3\n" in script
    assert f"#SBATCH --output={top}/slurm/%a/%A_%a.log\n" in script
    name = "untie_embeddings_and_output_weights"
    expected = [(seed, untied) for seed in (1, 2) for untied in (True, False)]
    for index, (seed, untied) in enumerate(expected):
        run = top / f"seed={seed}_{name}={str(untied).lower()}"
        assert (run / "slurm/jobs.txt").read_text() == f"41_{index}\n"
        settings = read_yaml(run / "slurm/config.yaml")
        assert (settings["seed"], settings[name], settings["save"]) == (seed, untied, str(run))
        # Run the element's script, with a fake job.sh.
        (run / "slurm/job.sh").write_text('echo "$RUN $CODE"\n')
        command = ["env", f"SLURM_ARRAY_TASK_ID={index}", "bash", str(top / "slurm/array.sbatch")]
        assert subprocess.check_output(command, text=True) == f"{run} {top}/slurm/code\n"
        assert (top / f"slurm/{index}").resolve() == run / "slurm" and not (run / "slurm/code").exists()
    assert (top / "slurm/code/pretrain_mesh.py").is_file()
    monkeypatch.setenv("JOB", PENDING)
    capsys.readouterr()
    main(["--status", str(top)])
    assert capsys.readouterr().out.count("waiting") == 4
    for command in ("--follow", "--change"):
        with pytest.raises(UserError, match=r"is a sweep; name one of its runs, such as .*/seed=1"):
            main([command, str(top)])
    main(["--cancel", str(top / f"seed=2_{name}=true")])
    assert (lab / "scancel").read_text() == "41_2\n"
    main(["--change", str(run), "--nodes", "2"])  # leaves the array and becomes a separate job
    script = (run / "slurm/job.sbatch").read_text()
    assert f"CODE={top}/slurm/code\n" in script and "#SBATCH --nodes=2\n" in script
    assert (run / "slurm/jobs.txt").read_text() == "41_3\n42\n"
    assert (lab / "scancel").read_text() == "41_2\n41_3\n"


@pytest.mark.parametrize(
    "command,acted", [("--requeue", "--batch --signal=USR1 41_3\n"), ("--cancel", "41_3\n")]
)
def test_a_sweep_s_runs_are_acted_on_one_by_one(lab, capsys, monkeypatch, command, acted) -> None:
    """One run is done, one fails, one is over: the last one is still acted on."""
    submit(lab, "--sweep", "seed=1,2,3,4")
    (lab / "run/seed=1/run_status.txt").write_text("done\n")
    for index, state in enumerate([FAILED, SUSPENDED, FAILED, RUNNING]):
        monkeypatch.setenv(f"JOB_41_{index}", state)
    if command == "--cancel":
        text = (lab / "bin/scancel").read_text()
        (lab / "bin/scancel").write_text(f"{text}[ $1 != 41_1 ] || {{ echo no >&2; exit 1; }}\n")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([command, str(lab / "run")])
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.err.count("\n") == 1
    assert said.err.startswith(f"error: {lab}/run/seed=2: ")
    assert (lab / "scancel").read_text().endswith(acted)
    if command == "--requeue":
        assert "seed=1 is trained to the end" in said.out and "submitted job 42" in said.out
        monkeypatch.setenv("JOB_41_1", RUNNING)
        main([command, str(lab / "run")])  # a finished run is not an error


def test_runs_do_not_share_what_they_write(lab) -> None:
    """--output-dir, --tensorboard-dir and --wandb-exp-name get the run's name."""
    flags = ["--output-dir", "/logs", "--tensorboard-dir", "/board", "--wandb-exp-name", "mesh"]
    submit(lab, "--sweep", "seed=1,2", *flags)
    for label in ("seed=1", "seed=2"):
        found = read_yaml(lab / f"run/{label}/slurm/config.yaml")
        names = [found[name] for name in ("output_dir", "tensorboard_dir", "wandb_exp_name")]
        assert names == [f"/logs/{label}", f"/board/{label}", f"mesh-{label}"]


def test_a_chain_of_arrays(lab) -> None:
    submit(lab, "--sweep", "seed=1,2", "--chain", "2")
    assert (lab / "run/seed=2/slurm/jobs.txt").read_text().split() == ["41_1", "42_1"]
    assert "REQUEUE=no" in (lab / "run/seed=2/slurm/job.sbatch").read_text()
    assert "afterany:41" in (lab / "sbatch").read_text().splitlines()[1]


def test_a_dry_run_shows_the_array(lab, capsys) -> None:
    submit(lab, "--sweep", "lr=1e-3,3e-4", "--dry-run")
    said = capsys.readouterr().out
    assert f"# {lab}/run/lr=1e-3\n" in said and "#SBATCH --array=0-1\n" in said
    assert f"RUN={lab}/run/lr=1e-3\nCODE={lab}/run/slurm/code\n" in said
    assert not (lab / "run").exists()


@pytest.mark.parametrize(
    "flags,message",
    [
        (["seed"], "is not NAME=VALUE"),
        (["seed=1,,2"], "is not NAME=VALUE"),
        (["seed=1,1"], "cannot name a run's directory"),
        (["data_path=/a,/b"], "cannot name a run's directory"),
        (["sede=1"], "did you mean --seed"),
        (["save=a,b"], "its own directory under --save"),
        (["bf16=yes"], "write true or false"),
        (["seed=1,2", "--sweep", "seed=3"], "is given twice"),
        (["global_batch_size=16,17"], "global_batch_size=17: "),
        (["seed=1,2", "--gpu-memory-gib", "0.0001"], "GiB, more than --gpu-memory-gib 0.0001"),
    ],
)
def test_a_wrong_sweep_writes_nothing(lab, flags, message) -> None:
    with pytest.raises(UserError, match=message):
        submit(lab, "--sweep", *flags)
    assert not (lab / "run").exists() and not (lab / "sbatch").exists()


def test_a_refused_array_leaves_nothing(lab, monkeypatch) -> None:
    monkeypatch.setenv("REFUSE", "error: Invalid job array specification")
    with pytest.raises(UserError, match="Invalid job array"):
        submit(lab, "--sweep", "seed=1,2")
    assert not (lab / "run").exists()
