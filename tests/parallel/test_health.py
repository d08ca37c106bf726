"""A job ends if a rank fails, is killed or hangs, and reports which rank and where."""

import re
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_mesh.data.indexed import IndexedWriter
from megatron_mesh.runtime import exits
from tests.helpers import tiny_config
from tests.parallel.forked import Rank, end_ranks, start_ranks
from tests.parallel.hung import start_hung_run

ROOT = Path(__file__).resolve().parents[2]
HOST = socket.gethostname()

SCRIPT = """
import os, signal, sys, time
import torch.distributed as dist
from megatron_mesh.config.schema import Config, ParallelConfig
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import health as health_module
from megatron_mesh.runtime.distributed import process_groups
from megatron_mesh.runtime.environment import rank_from_environment

health_module.FOLLOW_SECONDS = 3.0  # shorter than in production
config = Config(parallel=ParallelConfig(watchdog_timeout_minutes=float(sys.argv[2])))
with process_groups(config) as health:
    health.beat("step 17")
    dist.barrier()
    {before}
    if rank_from_environment() == 1:
        {action}
    dist.barrier()
"""


def job(
    tmp_path: Path,
    action: str,
    watchdog_minutes: float = 0.0,
    before_the_barrier: str = "pass",
    *,
    meanwhile: Callable[[list[Rank]], None] | None = None,
    script: str = SCRIPT,
) -> tuple[list[int | None], list[str], float]:
    """Run two ranks without a launcher, which would end the survivor; return exit codes, errors and seconds.

    Args:
        action: Python code that rank 1 runs between two barriers.
        before_the_barrier: Python code that both ranks run before ``action``.
        meanwhile: called with the ranks while they run.
    """
    file = tmp_path / "job.py"
    file.write_text(script.replace("{action}", action).replace("{before}", before_the_barrier))
    started, arguments = time.monotonic(), (str(file), watchdog_minutes)
    ranks = start_ranks(_run_script, [arguments, arguments], tmp_path)
    if meanwhile is not None:
        meanwhile(ranks)
    codes, errors = end_ranks(ranks)
    return codes, errors, time.monotonic() - started


def _run_script(rank: int, file: str, watchdog_minutes: float) -> None:
    sys.argv = [file, str(rank), str(watchdog_minutes)]
    runpy.run_path(file, run_name="__main__")


def test_a_failure_is_reported_where_it_happened(tmp_path) -> None:
    codes, errors, _ = job(tmp_path, "raise RuntimeError('out of cheese')")
    assert codes == [1, 1]
    assert f"error: rank 1 of 2 on host {HOST} in step 17: failed:\nTraceback" in errors[1]
    assert "out of cheese" in errors[1]
    because = f"because rank 1 of 2 on host {HOST} in step 17 failed"
    assert f"error: rank 0 of 2 on host {HOST} in step 17 ends, {because}" in errors[0]
    assert "Traceback" not in errors[0]


def test_a_mistake_is_reported_once(tmp_path) -> None:
    codes, errors, seconds = job(tmp_path, "raise UserError('no such file')")
    assert codes == [2, 2] and seconds < 300  # not until a timeout
    assert errors[1] == f"error: rank 1 of 2 on host {HOST} in step 17: no such file\n"
    assert "no such file" not in errors[0] and f"because rank 1 of 2 on host {HOST} in step 17" in errors[0]


def test_each_cause_is_reported_once(tmp_path) -> None:
    both = "raise UserError('the same')"
    codes, errors, _ = job(tmp_path, "pass", before_the_barrier=both)
    assert codes == [2, 2] and "".join(errors).count("the same") == 1
    each = "raise UserError(f'number {rank_from_environment()}')"
    codes, errors, _ = job(tmp_path, "pass", before_the_barrier=each)
    assert codes == [2, 2]
    for rank, text in enumerate(errors):
        assert text == f"error: rank {rank} of 2 on host {HOST} in step 17: number {rank}\n"


@pytest.mark.parametrize("failing", [1, 0])
def test_a_rank_that_only_waits_ends_too(tmp_path, failing) -> None:
    """Only the monitoring can notice: a collective on GPUs doesn't, and here the other rank just sleeps.

    If rank 0 ends, the store ends with it.
    """
    waits = f"time.sleep(1000) if rank_from_environment() != {failing} else None"
    codes, errors, seconds = job(tmp_path, "pass", before_the_barrier=f"{waits}\n    raise UserError('bad')")
    assert codes == [2, 2] and seconds < 300  # not until a timeout
    who = f"rank {failing} of 2 on host {HOST} in step 17"
    assert errors[failing] == f"error: {who}: bad\n"
    other = f"rank {1 - failing} of 2 on host {HOST} in step 17"
    assert errors[1 - failing] == f"error: {other} ends, because {who} failed\n"


def test_a_rank_that_only_waits_ends_when_the_store_is_lost(tmp_path) -> None:
    """Rank 0 is killed, so it can't notify rank 1, which is sleeping."""
    killed = "os.kill(os.getpid(), signal.SIGKILL) if rank_from_environment() == 0 else time.sleep(1000)"
    codes, errors, seconds = job(tmp_path, "pass", before_the_barrier=killed)
    assert codes == [-9, 1] and seconds < 300  # not until a timeout
    lines = [line for line in errors[1].splitlines() if line.startswith("error")]
    gone = (
        "rank 0 on host 127.0.0.1 (MASTER_ADDR) is gone; if it printed no error, check whether it was killed"
    )
    assert lines == [f"error: rank 1 of 2 on host {HOST} in step 17 ends, because {gone}"]


def test_a_rank_may_take_longer_to_end_than_the_store(tmp_path) -> None:
    """Rank 0 has long ended when rank 1 has closed its files. That is not a failure."""
    slow = SCRIPT.rpartition("    dist.barrier()")[0] + "    time.sleep(5 * rank_from_environment())\n"
    assert job(tmp_path, "pass", script=slow)[:2] == ([0, 0], ["", ""])


def test_a_killed_rank_does_not_leave_the_other_waiting(tmp_path) -> None:
    codes, errors, seconds = job(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert codes == [1, -9]
    lost = f"error: rank 0 of 2 on host {HOST} in step 17: failed (lost connection: look for a rank"
    assert lost in errors[0]
    assert seconds < 300  # not until a timeout


def test_the_watchdog_ends_a_job_that_hangs(tmp_path) -> None:
    codes, errors, _ = job(tmp_path, "time.sleep(1000)", watchdog_minutes=0.05)
    assert codes == [3, 3]
    for rank, text in enumerate(errors):
        assert f"error: rank {rank} of 2 on host {HOST} in step 17 has made no progress for" in text
        assert "--watchdog-timeout-minutes" in text and "Current thread" in text
    assert "barrier" in errors[0]


STEPS = """
    for step in range({steps}):
        health.beat(f"step {step}")
        print(step, file=open(sys.argv[0] + "." + sys.argv[1], "a"))
        dist.barrier()
        time.sleep(0.5)
""".strip()


def suspend(
    ranks: list[int], log: Path, until: Callable[[list[Rank]], object]
) -> Callable[[list[Rank]], None]:
    """Send SIGSTOP to ``ranks`` once they are stepping, and SIGCONT when ``until`` returns."""

    def meanwhile(job: list[Rank]) -> None:
        logs = [log.with_name(f"{log.name}.{rank}") for rank in ranks]
        while not all(path.exists() and path.read_text().count("\n") > 2 for path in logs):
            assert all(rank.process.exitcode is None for rank in job)
            time.sleep(0.1)
        for rank in ranks:
            job[rank].send_signal(signal.SIGSTOP)
        until(job)
        for rank in ranks:
            job[rank].send_signal(signal.SIGCONT)

    return meanwhile


def test_a_suspended_job_continues(tmp_path) -> None:
    """As with ``scontrol suspend``, all ranks stop for longer than the watchdog's limit."""
    steps = STEPS.replace("{steps}", "5")
    meanwhile = suspend([0, 1], tmp_path / "job.py", lambda _: time.sleep(7))
    codes, errors, _ = job(tmp_path, "pass", 0.08, steps, meanwhile=meanwhile)
    assert codes == [0, 0], errors
    suspensions = re.findall(r"was suspended for (\d+) s", errors[0])
    assert len(suspensions) == 1 and 5 <= int(suspensions[0]) < 60 and "error" not in "".join(errors)


def test_a_suspended_rank_is_reported_by_the_other(tmp_path) -> None:
    steps = STEPS.replace("{steps}", "100")
    meanwhile = suspend([1], tmp_path / "job.py", lambda job: job[0].wait(300))
    codes, errors, _ = job(tmp_path, "pass", 0.05, steps, meanwhile=meanwhile)
    assert codes == [3, 1], errors
    assert re.search(rf"error: rank 0 of 2 on host {HOST} in step \d+ has made no progress for", errors[0])
    assert re.search(r"error: rank 1 .* ends, because rank 0 on host 127.0.0.1 .* is gone", errors[1])


SAVE_ON_BOTH = """
    import contextlib
    stack = contextlib.ExitStack()
    stack.enter_context(health.busy("the save after step 17", {minutes}))
"""


def test_the_watchdog_has_another_limit_for_saves(tmp_path) -> None:
    """A save may take longer than a step, but one that hangs ends the job."""
    patient = SAVE_ON_BOTH.replace("{minutes}", "5").strip()
    codes, errors, _ = job(tmp_path, "time.sleep(4)", 0.05, patient)
    assert codes == [0, 0], errors
    hurried = SAVE_ON_BOTH.replace("{minutes}", "0.05").strip()
    codes, errors, _ = job(tmp_path, "time.sleep(1000)", 5.0, hurried)
    assert codes == [3, 3]
    for rank, text in enumerate(errors):
        assert (
            f"error: rank {rank} of 2 on host {HOST} in the save after step 17 has made no progress" in text
        )
        assert "--save-timeout-minutes" in text and "Current thread" in text


# where a rank hangs -> (phase, rank, settings, place in the error message)
HUNG_SAVES = {
    "writing in a save": ("writing a box", 1, {"train_iters": 4}, "the save after step 2"),
    "writing in the last save": ("writing a box", 1, {"train_iters": 2, "async_save": True}, "the last save"),
    "publishing": (
        "checks",
        0,
        {"train_iters": 4, "async_save": True},
        "publishing a checkpoint after step 3",
    ),
}


@pytest.fixture(scope="module")
def hung_saves(tmp_path_factory) -> dict[str, tuple[list[int | None], list[str]]]:
    """Run ``HUNG_SAVES`` at the same time, since they mostly wait; return how they ended."""
    root = tmp_path_factory.mktemp("hung")
    with IndexedWriter(str(root / "text"), np.uint16) as writer:
        writer.add(np.random.default_rng(0).integers(0, 96, 4_000).astype(np.uint16), np.full(100, 40))
        writer.commit()
    runs = {}
    for name, (phase, victim, settings, _) in HUNG_SAVES.items():
        directory = root / name.replace(" ", "-")
        directory.mkdir()
        values = {
            "layers": "1+1R2+1",
            "data_path": [str(root / "text")],
            "data_cache_path": str(directory / "cache"),
            "num_workers": 0,
            "eval_interval": 0,
            "save": str(directory / "save"),
            "save_interval": 2,
            "watchdog_timeout_minutes": 0.25,
            "save_timeout_minutes": 0.05,
            **settings,
        }
        runs[name] = start_hung_run(tiny_config(world_size=2, **values), phase, victim, directory)
    return {name: end_ranks(ranks, 120) for name, ranks in runs.items()}


@pytest.mark.parametrize("name", HUNG_SAVES)
def test_a_run_whose_save_hangs_ends(name: str, hung_saves) -> None:
    """The error names the limit for saves, not the one for steps."""
    _, victim, _, where = HUNG_SAVES[name]
    codes, errors = hung_saves[name]
    assert codes[victim] == exits.HUNG, errors
    # The other rank waits for this one, until its own watchdog ends it or the connection is lost.
    assert codes[1 - victim] in (exits.HUNG, exits.CRASHED), errors
    lines = [line for line in errors[victim].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].endswith("s (--save-timeout-minutes); its stacks:")
    assert lines[0].startswith(
        f"error: rank {victim} of 2 on host {HOST} in {where} has made no progress for "
    )
