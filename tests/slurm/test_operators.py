"""What operators do on a real SLURM: sweeps, changes, unusual paths and sites, submission inside a job."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.runs import ROOT, SITE, STEPS, Job, tool
from tests.slurm.test_jobs import assert_same, every_event

SHORT = ("--train-iters", 5, "--lr-decay-iters", 5)


def element(cluster: Cluster, run: Path) -> Job:
    """The job of one run of a sweep."""
    return Job(cluster, run, (run / "slurm/jobs.txt").read_text().split()[-1])


@every_event
def test_a_sweep_is_an_array_of_runs(cluster, settings, tmp_path) -> None:
    """Stopping the last element does not affect the other one."""
    site = tmp_path / "site.sh"
    site.write_text(SITE.replace("GPUS_PER_NODE=1", "GPUS_PER_NODE=2"))
    top = tmp_path / "sweep"
    text = tool(cluster, "--site", site, "--config", settings, "--save", top, "--sweep", "seed=7,8")
    first, last = (element(cluster, top / f"seed={seed}") for seed in (7, 8))
    array = text.split("submitted job ")[1].split(";")[0]
    assert [first.number, last.number] == [f"{array}_0", f"{array}_1"]
    last.wait_for_step(25)
    cluster.call("scancel", "--batch", "--signal=USR1", last.number)
    for job in (first, last):
        assert job.wait_for_end() == "COMPLETED", job.log
        assert job.status() == "done" and sorted(dict(job.losses())) == list(range(1, STEPS + 1))
    assert (first.fields["Restarts"], last.fields["Restarts"]) == ("0", "1")
    assert first.losses() != last.losses() and len(last.losses()) == STEPS
    assert first.fields["NodeList"] == last.fields["NodeList"], "meant for two runs on one node"
    table = tool(cluster, "--status", top).splitlines()
    assert [line.split()[1:4] for line in table[1:]] == [["done", "60", "60"]] * 2
    cluster.clear()


@every_event
def test_a_sweep_s_element_is_cancelled_alone(cluster, settings, tmp_path) -> None:
    site = tmp_path / "site.sh"
    site.write_text(SITE)
    top = tmp_path / "sweep"
    flags = ["--sweep", "seed=1,2", "--sweep", "lr=0.1,0.2", "--at-once", 1]
    tool(cluster, "--site", site, "--config", settings, "--save", top, *SHORT, *flags)
    runs = [top / f"seed={seed}_lr={lr}" for seed in (1, 2) for lr in (0.1, 0.2)]
    assert "cancelled job" in tool(cluster, "--cancel", runs[1])
    jobs = [element(cluster, run) for run in runs]
    others = [job for job in jobs if job.run != runs[1]]  # SLURM forgets cancelled elements at once
    assert [job.wait_for_end() for job in others] == ["COMPLETED"] * 3
    assert "state       not started\n" in tool(cluster, "--status", runs[1])
    text = tool(cluster, "--requeue", runs[1])
    again = Job(cluster, runs[1], text.removeprefix("submitted job ").strip())
    assert again.wait_for_end() == "COMPLETED" and again.status() == "done"
    cluster.clear()


@every_event
def test_other_nodes(start, undisturbed, cluster) -> None:
    """A run is stopped on one node, changed, and trained to the end on two, with the same numbers."""
    job = start("--gpus-per-node", 2, nodes=1)
    answer = cluster.call("sbatch", "--parsable", f"--dependency=afterok:{job.number}", "--wrap", "true")
    dependant = int(answer)
    job.wait_for_step(25)
    for rank in job.ranks():
        rank.suspend()  # the tool takes longer than the run
    assert "touch" in tool(cluster, "--change", job.run, "--nodes", 2, code=2)
    (job.run / "stop").touch()
    for rank in job.ranks():
        rank.resume()
    assert job.wait_for_end() == "FAILED" and job.fields["ExitCode"] == "75:0"
    assert "stopped on request" in job.log.splitlines()[-1]
    text = tool(cluster, "--status", job.run)
    assert "state       stopped\n" in text and "FAILED: ended before the end of the run" in text
    wait_until(lambda: cluster.job(dependant)["Reason"] == "DependencyNeverSatisfied", 60, "a refusal")
    text = tool(cluster, "--change", job.run, "--nodes", 2, "--gpus-per-node", 1)
    assert "nodes: 1 -> 2" in text and "gpus-per-node: 2 -> 1" in text
    again = Job(cluster, job.run, text.split("submitted job ")[1].split(";")[0])
    assert again.wait_for_end() == "COMPLETED", again.log
    assert again.fields["NumNodes"] == "2"
    assert_same(again, undisturbed)


@every_event
def test_changes_of_a_waiting_job(start, cluster) -> None:
    """With other settings it stays in the queue; with other nodes another job replaces it."""
    job = start(site="SBATCH_OPTIONS+=(--begin=now+1hour)\n")
    text = tool(cluster, "--change", job.run, "--lr", 0.5)
    assert "lr: 0.01 -> 0.5" in text and "keeps its place" in text
    assert job.fields["JobState"] == "PENDING" and "Held" not in job.fields["Reason"]
    text = tool(cluster, "--change", job.run, "--nodes", 1, "--gpus-per-node", 2)
    again = Job(cluster, job.run, text.split("submitted job ")[1].split(" in place of ")[0])
    assert job.fields["JobState"] == "CANCELLED"
    assert again.fields["JobState"] == "PENDING" and "Held" not in again.fields["Reason"]
    assert again.fields["NumNodes"] == "1-1"
    assert f"job {again.number} (PENDING)" in tool(cluster, "--cancel", job.run)
    assert again.fields["JobState"] == "CANCELLED"


@every_event
def test_odd_paths_and_options(cluster, settings, tmp_path) -> None:
    """Spaces, quotes, non-ASCII letters and % in RUN, and an option of two words."""
    run = tmp_path / "my own/größe 50%j's"
    run.parent.mkdir()
    site = tmp_path / "the site.sh"
    hook = 'SBATCH_OPTIONS+=(--comment="two words")\non_end_hook() { echo "$@" >"$3/hook"; }\n'
    site.write_text(SITE + hook)
    tool(cluster, "--site", site, "--nodes", 2, "--config", settings, "--save", run, *SHORT)
    job = element(cluster, run)
    assert job.wait_for_end() == "COMPLETED", job.log
    assert "Comment=two words" in cluster.call("scontrol", "show", "job", job.number)
    assert job.status() == "done" and "trained to the end" in job.log
    assert (run / "hook").read_text() == f"done 5 {run}\n"
    assert job.log.splitlines()[-1] in tool(cluster, "--follow", run).splitlines()
    cluster.clear()


@every_event
def test_a_site_that_exports_nothing(start) -> None:
    """--export=NONE leaves the tasks without PATH and other variables."""
    job = start(*SHORT, site="SBATCH_OPTIONS+=(--export=NONE)\n")
    assert job.wait_for_end() == "COMPLETED", job.log
    assert job.status() == "done" and job.fields["Restarts"] == "0"


INSIDE = ["salloc", "-n2", "--mem-per-cpu=10", "srun", "-n1", "--cpu-bind=cores", "-m", "cyclic"]


@every_event
def test_submission_from_inside_an_allocation(cluster, settings, tmp_path) -> None:
    """With the tool and by hand: variables of the outer job do not reach the new one."""
    site = tmp_path / "site.sh"
    site.write_text(SITE)
    run = tmp_path / "run"
    command = [sys.executable, ROOT / "tools/submit_slurm.py", "--site", site, "--nodes", 2]
    command += ["--config", settings, "--save", run, *SHORT]
    _inside(cluster, INSIDE, command)
    script = tmp_path / "by_hand.sbatch"
    options = "--ntasks-per-node=1 --nodes=2 --gpus-per-node=1"
    flags = shlex.join(map(str, SHORT))
    script.write_text(
        f"#!/usr/bin/env bash\n#SBATCH {options} --output={tmp_path}/by_hand.log\n"
        f"RUN={tmp_path}/by_hand CODE={ROOT} SITE={site} SETTINGS=(--config {settings} {flags})\n"
        f". {ROOT}/megatron_mesh/slurm/job.sh\n"
    )
    _inside(cluster, INSIDE, ["sbatch", script])
    number = _newest(cluster)
    job, by_hand = element(cluster, run), Job(cluster, tmp_path / "by_hand", number)
    for each in (job, by_hand):
        assert each.wait_for_end() == "COMPLETED", each.log
        assert each.status() == "done" and each.fields["Restarts"] == "0"
    assert "submitted from inside" not in job.log
    assert "SLURM_CPU_BIND" in (tmp_path / "by_hand.log").read_text().splitlines()[0]
    (found,) = json.loads(tool(cluster, "--status", by_hand.run, "--json"))
    assert found["state"] == "done" and [each["job"] for each in found["jobs"]] == [str(number)]
    cluster.clear()


@every_event
def test_an_outer_job_s_variables_do_not_reach_a_job_by_hand(cluster, tmp_path) -> None:
    """sbatch inside salloc and inside an array element, where no variable of srun gives that away."""
    inner = tmp_path / "inner.sbatch"
    (tmp_path / "site.sh").write_text(
        'ENVIRONMENT=venv PYTHON=true\nprepare() { env >"$RUN/environment"; }\n'
    )
    inner.write_text(
        f"#!/usr/bin/env bash\n#SBATCH --ntasks=2 --open-mode=append --output={tmp_path}/%j.log\n"
        f"RUN={tmp_path}/$SLURM_JOB_ID CODE={ROOT} SITE={tmp_path}/site.sh SETTINGS=()\n"
        f". {ROOT}/megatron_mesh/slurm/job.sh\n"
    )
    _inside(cluster, ["salloc", "-n4", "-m", "cyclic"], ["sbatch", inner])
    numbers = [_newest(cluster)]
    outer = tmp_path / "outer.sbatch"
    outer.write_text(f"#!/usr/bin/env bash\n#SBATCH -m cyclic --array=3 --output=/dev/null\nsbatch {inner}\n")
    cluster.call("sbatch", str(outer))
    wait_until(lambda: _newest(cluster) == numbers[0] + 2, 60, "the job that an array's element submits")
    numbers.append(_newest(cluster))
    for number in numbers:
        job = Job(cluster, tmp_path / str(number), number)
        assert job.wait_for_end() == "FAILED"  # nothing has been trained, twice
        assert job.fields["Restarts"] == "1"
        log = (tmp_path / f"{number}.log").read_text()
        assert f" {number}.0] start on " in log and "them: SLURM_DISTRIBUTION\n" in log
        names = {line.split("=")[0] for line in (job.run / "environment").read_text().splitlines()}
        assert "SLURM_NTASKS" in names and not {"SLURM_DISTRIBUTION", "SLURM_ARRAY_TASK_ID"} & names
    cluster.clear()


def _newest(cluster: Cluster) -> int:
    return max(map(int, cluster.call("squeue", "-h", "-t", "all", "-o", "%A").split()))


def _inside(cluster: Cluster, outer: list[str], command: list) -> None:
    ended = subprocess.run(
        [*outer, *map(str, command)], env=cluster.environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr


@every_event
def test_status_without_a_controller(undisturbed, tmp_path, monkeypatch) -> None:
    """The state comes from the files, and one line says that SLURM does not answer."""
    conf = Path(undisturbed.cluster.environment["SLURM_CONF"])
    lines = conf.read_text().splitlines()
    away = tmp_path / "slurm.conf"
    away.write_text("\n".join("SlurmctldPort=9" if x.startswith("SlurmctldPort") else x for x in lines))
    monkeypatch.setitem(undisturbed.cluster.environment, "SLURM_CONF", str(away))
    text = tool(undisturbed.cluster, "--status", undisturbed.run)
    assert "state       done\n" in text and f"{STEPS} of {STEPS}, loss" in text
    (line,) = [line for line in text.splitlines() if line.startswith("slurm")]
    assert "only the run's files were read" in line
