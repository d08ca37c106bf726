"""environment.sh removes variables that leak into a job from the shell that submitted it."""

from tests.unit.slurm.job_script import HOOK, ending


def test_rendezvous_variables_of_the_submitting_shell_are_removed(job, tmp_path) -> None:
    job(ending("stopped", 42), MASTER_ADDR="elsewhere", MASTER_PORT="1", RANK="0", WORLD_SIZE="1")
    assert (tmp_path / "rendezvous").read_text().split() == ["node1"]


def test_an_element_of_an_array_acts_on_itself(job, tmp_path) -> None:
    """Although the last element's SLURM_JOB_ID is the number of the whole array."""
    job(ending("running", 1, 10), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert (tmp_path / "requeued").read_text() == "7_2\n"
    assert (tmp_path / "run/slurm/starts.txt").read_text().startswith("7_2.0 0 start ")


def test_a_heterogeneous_job_is_refused(job, tmp_path) -> None:
    ended = job(ending("done", 0), SLURM_HET_SIZE="2", ELEMENT="HetJobId=7 HetJobOffset=0", HOOK=HOOK + "}")
    assert ended.returncode == 2 and "a run cannot use a heterogeneous job (2 parts)" in ended.stdout
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "hook").read_text().split() == ["refused", "0", str(tmp_path / "run"), "python"]


def test_array_restart_and_het_variables_of_an_outer_job(job, tmp_path) -> None:
    """A job submitted by hand inside an array element acts on itself and uses its own restart count."""
    leaked = {"SLURM_ARRAY_JOB_ID": "3", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "1"}
    leaked |= {"SLURM_RESTART_COUNT": "4", "SLURM_HET_SIZE": "2"}
    job(ending("running", 1, 10), **leaked, ELEMENT="", RESTARTS="0")
    assert (tmp_path / "requeued").read_text() == "7\n"
    assert "7.0 0 start " in (tmp_path / "run/slurm/starts.txt").read_text()
    environment = (tmp_path / "environment").read_text()
    assert "SLURM_RESTART_COUNT=0\n" in environment
    assert "SLURM_ARRAY" not in environment and "SLURM_HET" not in environment
    # If the controller doesn't answer, the environment is used.
    ended = job(ending("running", 1, 20), **leaked | {"SLURM_HET_SIZE": ""}, KNOWN="no")
    assert " 3_1.4] start on node1" in ended.stdout


def test_variables_of_another_job_do_not_reach_srun(job, tmp_path) -> None:
    """Submitted inside srun or salloc, or with --export=NONE."""
    own = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_HINT": "nomultithread"}
    own |= {"SLURM_DIST_PLANESIZE": "4", "SLURM_GPUS_PER_TASK": "1"}
    script = tmp_path / "job.sbatch"
    options = ["--ntasks-per-node=8", "--hint=nomultithread", "-m plane=4", "--gpus-per-task 1"]
    lines = "".join(f"#SBATCH {option}\n" for option in options)
    script.write_text(f"#!/usr/bin/env bash\n{lines}{script.read_text()}")
    leaked = {"SLURM_CPU_BIND": "quiet,cores", "SLURM_MEM_PER_CPU": "10", "SLURM_MEM_PER_NODE": "20"}
    leaked |= {"SLURM_EXPORT_ENV": "NONE", "SRUN_DEBUG": "3", "SBATCH_TIMELIMIT": "1"}
    said = job(ending("done", 0), **own, **leaked).stdout
    assert "another job" not in said and "ignored" not in said

    def environment() -> dict[str, str]:
        lines = (tmp_path / "environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    assert own.items() <= environment().items() and not leaked.keys() & environment().keys()
    assert "--export=ALL\n/bin/bash\n" in (tmp_path / "srun").read_text()
    # No variable shows that the shell is inside salloc or a batch script.
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
