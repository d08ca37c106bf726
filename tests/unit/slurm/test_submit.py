"""tools/submit_slurm.py: what it writes, submits and refuses, with fake SLURM commands."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_mesh
from megatron_mesh.arguments import parse_args
from megatron_mesh.config.resolve import resolve
from megatron_mesh.errors import UserError
from megatron_mesh.slurm import submission
from megatron_mesh.slurm.script import sbatch_option
from megatron_mesh.slurm.site import read_site, seconds_of
from tests.unit.slurm.conftest import ROOT
from tests.unit.slurm.tool import DATA, MODEL, SAVING, main, submit


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
    # The copied program imports the copied package.
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


def test_a_refused_submission_can_be_repeated(lab, monkeypatch) -> None:
    monkeypatch.setenv("REFUSE", "error: invalid partition specified: gpu")
    with pytest.raises(UserError, match="invalid partition"):
        submit(lab)
    monkeypatch.setenv("REFUSE", "")
    submit(lab)
    with pytest.raises(UserError, match="was submitted before"):
        submit(lab)


def test_a_save_longer_than_kill_wait_is_reported(lab, capsys) -> None:
    submit(lab)
    assert "a save takes up to 60 s, but SLURM kills a job 30 s after" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fault,message",
    [
        ("REFUSE=error: invalid partition specified", "sbatch refused: sbatch: error: invalid partition"),
        ("FULL", "No space left on device"),
        ("DENIED", "Permission denied"),
    ],
)
def test_what_fails_leaves_nothing_behind(lab, monkeypatch, fault, message) -> None:
    """Refusal, full disk, no permission: the error is one line, and no new directory remains."""
    run = lab / "new/deep/run"
    if fault.startswith("REFUSE"):
        monkeypatch.setenv(*fault.split("=", 1))
    elif fault == "FULL":

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device", "somewhere")

        monkeypatch.setattr(submission, "record_jobs", full)
    else:

        def denied(path: Path, *_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(UserError, match=message) as caught:
        submit(lab, "--save", str(run))
    assert "\n" not in str(caught.value)
    assert not (lab / "new").exists()
    if fault == "FULL":  # the job was already submitted
        assert (lab / "scancel").read_text() == "41\n"


def test_an_interrupted_submission_leaves_no_job(lab, monkeypatch) -> None:
    """Ctrl-C after sbatch, before the job is recorded."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submission, "record_jobs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        submit(lab, "--chain", "2")
    assert (lab / "scancel").read_text() == "42\n41\n" and not (lab / "run").exists()


@pytest.mark.parametrize(
    "options", ["-p big", "-pbig", "--partition big", "--partition=big", "-p other -p big"]
)
def test_the_partition_is_read_as_sbatch_reads_it(lab, options) -> None:
    with (lab / "site.sh").open("a") as file:
        file.write(f"SBATCH_OPTIONS=(--exclusive {options} --time=1:00)\n")
    assert read_site(lab / "site.sh").partition == "big"


def test_an_existing_directory_stays(lab, monkeypatch) -> None:
    (lab / "run").mkdir()
    (lab / "run/notes").touch()
    monkeypatch.setenv("REFUSE", "error: no")
    with pytest.raises(UserError, match="no"):
        submit(lab)
    assert [path.name for path in (lab / "run").iterdir()] == ["notes"]


def test_a_full_disk_is_one_line(lab) -> None:
    """On a real file system of 64 KiB."""
    place = lab / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "small", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(UserError, match=r"cannot be written .No space left on device."):
            submit(lab, "--save", str(place / "run"))
        assert not list(place.iterdir()) and not (lab / "sbatch").exists()
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_variables_of_the_submitting_shell_do_not_reach_sbatch(lab, capsys, monkeypatch) -> None:
    """The user submits inside another job and has sbatch options in the environment."""
    for name in ("SLURM_CPU_BIND", "SLURM_MEM_PER_CPU", "SLURM_STEP_ID", "SRUN_DEBUG"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "5")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    submit(lab)
    assert (lab / "sbatch-environment").read_text() == "SLURM_CONF=/etc/slurm.conf\n"
    assert "SBATCH_TIMELIMIT=5 is ignored; set sbatch options in the site file" in capsys.readouterr().err


def test_options_and_paths_are_quoted(lab) -> None:
    """tests/slurm does the same with the real sbatch."""
    with (lab / "site.sh").open("a") as file:
        file.write('SBATCH_OPTIONS+=(--comment="two words" --constraint="a|b" --exclusive)\n')
    run = lab / "my own/größe 50%j's"
    submit(lab, "--save", str(run), "--load", "/another run")
    path = run / "slurm/job.sbatch"
    script = path.read_text()
    assert "#SBATCH --comment='two words'\n" in script and "#SBATCH --constraint='a|b'\n" in script
    assert "#SBATCH --exclusive\n" in script
    assert sbatch_option(script, "output") == f"{run}/slurm/%j.log".replace("50%", "50%%")
    (run / "slurm/job.sh").write_text('printf "%s\\n" "$RUN" "$CODE" "$SITE" "$LOAD" "${SETTINGS[@]}"\n')
    said = subprocess.run(["bash", str(path)], capture_output=True, text=True, check=True).stdout
    files = run / "slurm"
    expected = [run, files / "code", files / "site.sh", "/another run", "--config", files / "config.yaml"]
    assert said.splitlines() == [str(word) for word in expected]


def test_a_container_needs_a_path_that_it_can_mount(lab) -> None:
    with (lab / "site.sh").open("a") as file:
        file.write("ENVIRONMENT=pyxis CONTAINER=image\n")
    with pytest.raises(UserError, match="cannot mount a path with a colon or comma"):
        submit(lab, "--save", str(lab / "a,b"))


def test_the_code_is_that_of_the_clone_whose_tool_was_started(lab) -> None:
    """Even if another clone comes first in PYTHONPATH."""
    clone = lab / "clone"
    for name in ("tools/submit_slurm.py", "megatron_mesh"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, clone / name)
    line = f"import runpy; runpy.run_path({str(clone / 'tools/submit_slurm.py')!r})"
    line += "; from megatron_mesh.slurm import submission; print(submission._ROOT)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", line]
    assert subprocess.check_output(command, env=environment, text=True, timeout=120).strip() == str(clone)
    with pytest.raises(
        UserError, match=f"the tool is in {clone}, but Python imported the package from {ROOT}"
    ):
        submission.check_clone(clone)


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--nodes", "0"], "--nodes 0 must be above 0"),
        (["--chain", "0"], "--chain 0 must be above 0"),
        (["--tensor-model-parallel-size", "3"], "3"),
        (["--gpu-memory-gib", "0.0001"], "GiB, more than --gpu-memory-gib 0.0001"),
        (["--time", "2"], "is too short: the early warning"),
        (["--time", "soon"], "is not in a form that sbatch accepts"),
        (["--site", "no_such_file"], "no_such_file is not a file"),
        (["--save", "a\\dir"], "has a backslash"),
        (["--json"], "--json goes with --status"),
        (["--at-once", "2"], "--at-once goes with --sweep"),
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
    for command in ("--status", "--follow", "--requeue", "--cancel"):
        with pytest.raises(UserError, match="is not a run: it has no jobs"):
            main([command, str(lab)])
    with pytest.raises(UserError, match="--nodes is for a new run, not for --status"):
        main(["--status", str(lab), "--nodes", "2"])
    with pytest.raises(UserError, match="--lr is for a new run, not for --cancel"):
        main(["--cancel", str(lab), "--lr", "1"])


@pytest.mark.parametrize(
    "change,message",
    [
        ("ENVIRONMENT=conda", "one of venv, pyxis, apptainer"),
        ("ENVIRONMENT=pyxis", "CONTAINER is not set"),
        ("SAVE_SECONDS=a", "SAVE_SECONDS=a must be a whole number"),
        (
            "SAVE_SECONDS=40000",
            "SAVE_SECONDS=40000 is too large, .* at most 65535 s; set it to at most 32737",
        ),
        ("GPUS_PER_NODE=", "GPUS_PER_NODE is not set"),
        ("PYTHON=/no/python", "cannot be run"),
        ("if", "bash fails to read it"),
        ("exec sleep 60", "did not finish within 0.5 s; move slow commands into prepare"),
    ],
)
def test_a_wrong_site_file(lab, change, message, monkeypatch) -> None:
    if "sleep" in change:
        monkeypatch.setattr("megatron_mesh.slurm.site._READ_SECONDS", 0.5)
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
    """They have the same sbatch options, and settings that the tool accepts."""
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


def test_an_installed_package_submits_its_own_code(lab) -> None:
    """Outside any clone, with the tool inside the package as in a wheel."""
    site = lab / "site-packages"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "megatron_mesh", site / "megatron_mesh", ignore=ignored)
    shutil.copy(ROOT / "pretrain_mesh.py", site)
    (site / "megatron_mesh/tools").mkdir(exist_ok=True)
    shutil.copy(ROOT / "tools/submit_slurm.py", site / "megatron_mesh/tools")
    command = [sys.executable, "-m", "megatron_mesh.tools.submit_slurm", "--site", str(lab / "site.sh")]
    command += ["--save", str(lab / "run"), *MODEL, *DATA, *SAVING]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=lab, timeout=120)
    assert ended.stdout.startswith("submitted job 41"), ended.stderr
    files = lab / "run/slurm"
    assert (files / "version.txt").read_text() == f"{megatron_mesh.__version__}\n"
    for name in (
        "job.sh",
        "task.sh",
        "environment.sh",
        "code/pretrain_mesh.py",
        "code/megatron_mesh/py.typed",
    ):
        assert (files / name).is_file(), name


def test_a_wheel_contains_every_file_of_the_package() -> None:
    """setup.py's package_data lists all files that are not Python."""
    calls = [
        node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)
    ]
    (data,) = [word.value for call in calls for word in call.keywords if word.arg == "package_data"]
    package_data = ast.literal_eval(data)
    for path in (ROOT / "megatron_mesh").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            package = ".".join(path.parent.relative_to(ROOT).parts)
            assert any(path.match(pattern) for pattern in package_data.get(package, [])), path
