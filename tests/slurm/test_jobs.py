"""Pretraining jobs on a real SLURM, and everything that can happen to them.

A run must resume when it should and only then, and end with the losses and weights of the undisturbed run,
bit for bit. One test always runs; MESH_TEST_SLURM=1 runs all (``make test-slurm``).
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest
import torch

from tests.slurm.cluster import wait_until
from tests.slurm.runs import STEPS, Job, tool

every_event = pytest.mark.skipif(
    os.environ.get("MESH_TEST_SLURM") != "1", reason="minutes; make test-slurm, or MESH_TEST_SLURM=1"
)


def assert_same(job: Job, undisturbed: Job, repeated: int | None = 0) -> None:
    """The run is done, with the same losses and weights; ``repeated`` steps ran twice (None: any number)."""
    assert job.status() == "done", job.log
    losses = job.losses()
    assert sorted(set(losses)) == undisturbed.losses()  # a repeated step had the same loss
    if repeated is not None:
        assert len(losses) == STEPS + repeated
    ours, theirs = job.weights(), undisturbed.weights()
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def stays(job: Job, state: str, seconds: float = 12) -> bool:
    """Whether the job stays in this state and is not restarted, even after its credentials have expired."""
    time.sleep(seconds)
    return job.fields["JobState"] == state and job.fields["Restarts"] == "0"


@contextmanager
def standing_still(ranks: list[psutil.Process]) -> Iterator[None]:
    """Keep ranks stopped, even if SLURM wakes them."""
    over = threading.Event()

    def hold() -> None:
        while not over.wait(0.02):
            for rank in ranks:
                with suppress(psutil.NoSuchProcess):
                    rank.suspend()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def make_way(job: Job) -> None:
    """Submit a job that needs all nodes, in the partition with the higher priority."""
    job.cluster.call(
        "sbatch", "-p", "high", "-N", "2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"
    )


def test_early_warning(start, undisturbed) -> None:
    """SLURM signals the batch script: the run saves, the job requeues itself, and no step runs twice."""
    job = start()
    job.wait_for_step(25)
    job.cluster.call("scancel", "--batch", "--signal=USR1", str(job.number))
    assert job.wait_for_end() == "COMPLETED"
    assert job.fields["Restarts"] == "1"
    assert_same(job, undisturbed)


@every_event
def test_scancel(start, undisturbed, cluster) -> None:
    """The run saves, and resumes only when the user requeues it."""
    job = start()
    job.wait_for_step(25)
    cluster.call("scancel", str(job.number))
    assert job.wait_for_end() == "CANCELLED"
    assert job.status() == "stopped"
    assert stays(job, "CANCELLED")
    status = tool(cluster, "--status", job.run)
    assert f"{job.losses()[-1][0]} of {STEPS}, loss {job.losses()[-1][1]:.4f}" in status
    assert "CANCELLED" in status and "stopped" in status
    text = tool(cluster, "--requeue", job.run)
    again = Job(cluster, job.run, int(text.removeprefix("submitted job ")))
    assert again.wait_for_end() == "COMPLETED"
    assert_same(again, undisturbed)
    assert "is trained to the end" in tool(cluster, "--requeue", job.run, code=2)


@every_event
def test_time_limit_with_early_warning(start, undisturbed) -> None:
    """The real signal, 70 s before the limit; the ranks are stopped until then."""
    job = start("--time", "2")
    job.wait_for_step(10)
    for rank in job.ranks():
        rank.suspend()
    wait_until(lambda: "asked to stop" in job.log, 90, "the early warning")
    for rank in job.ranks():
        rank.resume()
    assert job.wait_for_end() == "COMPLETED"
    assert job.fields["Restarts"] == "1" and "stopped early; requeued" in job.log
    assert_same(job, undisturbed)


@every_event
def test_time_limit_without_warning(start, undisturbed) -> None:
    """Only the SIGTERM at the time limit comes, since SIGURG does nothing."""
    job = start("--time", "2", site="SBATCH_OPTIONS+=(--signal=B:URG@1)\n")
    job.wait_for_step(10)
    ranks = job.ranks()
    for rank in ranks:
        rank.suspend()  # SLURM sends a SIGCONT before the SIGTERM
    job.wait_for_restart()
    assert job.wait_for_end() == "COMPLETED"
    assert "time is up; requeued" in job.log
    assert "resume from step 0" not in job.log
    assert_same(job, undisturbed)


@every_event
def test_time_limit_and_ranks_that_do_not_end(start, undisturbed) -> None:
    """The save hangs and SLURM kills everything: the run resumes from the previous checkpoint."""
    job = start("--time", "2", site="SBATCH_OPTIONS+=(--signal=B:URG@1)\n")
    job.wait_for_step(25)
    ranks = job.ranks()
    with standing_still(ranks):
        job.wait_for_restart()
    assert job.wait_for_end() == "COMPLETED"
    assert "the ranks do not end; requeued, to resume from step 20" in job.log
    assert_same(job, undisturbed, repeated=None)


@every_event
@pytest.mark.parametrize("partition", ["low", "nograce"])
def test_preemption(start, undisturbed, partition) -> None:
    job = start(site=f"SBATCH_OPTIONS=(--partition={partition})\n")
    job.wait_for_step(25)
    make_way(job)
    job.wait_for_restart()
    assert job.wait_for_end() == "COMPLETED"
    assert_same(job, undisturbed)


@every_event
def test_preemption_during_every_start_is_no_failure(start) -> None:
    """Without a step in between."""
    job = start("--train-iters", 5, "--lr-decay-iters", 5, site="SBATCH_OPTIONS=(--partition=nograce)\n")
    for count in (1, 2):
        wait_until(lambda n=count: job.log.count("start on node") == n, 120, "a start")
        make_way(job)
        job.wait_for_restart(count)
    assert job.wait_for_end() == "COMPLETED"
    assert job.log.count("ended by SLURM at step 0: preempted or requeued") == 2


@every_event
def test_requeue_by_the_administrator(start, undisturbed) -> None:
    job = start()
    job.wait_for_step(25)
    job.cluster.call("scontrol", "requeue", str(job.number))
    job.wait_for_restart()
    assert job.wait_for_end() == "COMPLETED"
    assert_same(job, undisturbed)


@every_event
def test_requeue_by_the_tool_saves_first(start, undisturbed, cluster) -> None:
    job = start()
    job.wait_for_step(1)
    for rank in job.ranks():
        rank.suspend()  # the tool may take longer than the run
    assert "will save and requeue itself" in tool(cluster, "--requeue", job.run)
    for rank in job.ranks():
        rank.resume()
    assert job.wait_for_end() == "COMPLETED"
    assert job.fields["Restarts"] == "1"
    assert_same(job, undisturbed)


@every_event
def test_a_lost_node_writes_no_more(start, undisturbed, cluster) -> None:
    """Its slurmd is dead but its ranks survive: they end at once when the job starts on the other node."""
    steps = 4000  # more than the old ranks can do before SLURM notices
    job = start("--gpus-per-node", 2, "--train-iters", steps, "--lr-decay-iters", STEPS, nodes=1)
    job.wait_for_step(25)
    before = job.ranks()
    node = job.fields["NodeList"]
    cluster.kill_node(node)
    job.wait_for_restart()
    assert len(before) == 2 and all(rank.is_running() for rank in before)
    wait_until(lambda: job.log.count("start on node") == 2, 60, "the second start")
    assert not any(rank.is_running() for rank in before)
    written = len(job.losses())
    wait_until(lambda: len(job.losses()) > written + 5, 60, "new steps")
    assert job.fields["NodeList"] != node
    cluster.call("scancel", str(job.number))
    assert job.wait_for_end() == "CANCELLED"
    losses = job.losses()
    assert len(dict(losses)) == len(set(losses))  # repeated steps had the same losses
    common = [(step, loss) for step, loss in sorted(set(losses)) if step <= STEPS]
    assert common == undisturbed.losses()


@every_event
def test_a_killed_rank(start, undisturbed) -> None:
    job = start()
    job.wait_for_step(25)
    job.ranks()[1].kill()
    assert job.wait_for_end() == "COMPLETED"
    assert job.fields["Restarts"] == "1" and "failed with exit status 137; requeued" in job.log
    assert_same(job, undisturbed, repeated=None)


@every_event
def test_a_run_that_fails_again_and_again_ends(start) -> None:
    job = start("--save-interval", 1000)
    for restarts in range(2):
        wait_until(lambda n=restarts: job.log.count("start on node") == n + 1, 60, "a start")
        wait_until(lambda: len(job.ranks()) == 2, 60, "both ranks")
        job.wait_for_step(5)
        job.ranks()[0].kill()
        if restarts == 0:
            job.wait_for_restart()
            (job.run / "metrics.jsonl").unlink()  # for wait_for_step
    assert job.wait_for_end() == "FAILED"
    assert job.fields["Restarts"] == "1"
    assert "the restart brought no new step" in job.log


@every_event
def test_bad_settings_are_not_retried(start) -> None:
    job = start("--data-path", "no_such_text")
    assert job.wait_for_end() == "FAILED"
    assert job.fields["ExitCode"] == "2:0" and stays(job, "FAILED")


@every_event
def test_a_stop_file_ends_the_run(start) -> None:
    job = start()
    job.wait_for_step(10)
    (job.run / "stop").touch()
    assert job.wait_for_end() == "FAILED" and job.fields["ExitCode"] == "75:0"
    assert job.status() == "stopped" and stays(job, "FAILED")
    assert not (job.run / "stop").exists()


@every_event
def test_a_chain(start, undisturbed, cluster) -> None:
    """The second job resumes where the first was stopped, and the third finds nothing to do."""
    job = start("--chain", 3)
    job.wait_for_step(25)
    cluster.call("scancel", "--batch", "--signal=USR1", str(job.number))
    last = Job(cluster, job.run, job.number + 2)
    assert last.wait_for_end() == "COMPLETED"
    assert [cluster.job(job.number + n)["Restarts"] for n in range(3)] == ["0", "0", "0"]
    assert "already trained to the end" in last.log
    assert_same(last, undisturbed)
