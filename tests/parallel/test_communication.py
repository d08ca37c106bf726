"""Test the check of a job's communication: it passes correct results and notices a wrong one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mesh.runtime import communication
from tests.parallel.pool import WorkerError, pool

ROOT = Path(__file__).resolve().parents[2]


def measure(megabytes: float) -> list[communication.Measurement]:
    return communication.measure_operations(megabytes, repeats=2)


def measure_with_a_fault(megabytes: float) -> None:
    """Shift the data of one rank by an element."""
    original, shift = communication._filled, int(dist.get_rank() == 1)
    communication._filled = lambda *values: original(*values).roll(shift)
    try:
        communication.measure_operations(megabytes, repeats=1)
    finally:
        communication._filled = original


def test_every_operation_is_correct_and_timed() -> None:
    found = pool(3).run(measure, 0.1)
    assert [each.name for each in found[0]] == [
        "all-reduce",
        "all-gather",
        "reduce-scatter",
        "send to the next",
    ]
    for each in found[0]:
        assert each.seconds > 0 and each.bus_gb_per_second > 0 and abs(each.size - 1e5) < 12
    assert found[0] == found[1] == found[2]  # all ranks know the slowest rank's time


def test_a_wrong_result_is_noticed() -> None:
    with pytest.raises(WorkerError, match=r"all-reduce gave a wrong result on rank 0 on \S+, .*2 on "):
        pool(3).run(measure_with_a_fault, 0.1)


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    """The factors on size / time for 4 ranks, from doc/PERFORMANCE.md in nccl-tests."""
    factors = {name: factor(4) for name, (factor, _) in communication._OPERATIONS.items()}
    assert factors == {"all-reduce": 1.5, "all-gather": 0.75, "reduce-scatter": 0.75, "send to the next": 1}


def run_tool(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/check_communication.py", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("flags", [(), ("--megabytes", "0"), ("--timeout", "0")])
def test_bad_input_is_one_message(flags: tuple[str, ...]) -> None:
    done = run_tool(*flags)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_a_missing_rank_is_one_message() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    done = run_tool("--timeout", "1", WORLD_SIZE="2", RANK="0", **address)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: the ranks did not meet at 127.0.0.1 (" in done.stderr
