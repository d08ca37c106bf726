"""The check of a job's communication: right results, and a wrong one is noticed."""

import pytest
import torch.distributed as dist

from megatron_mesh.bench import communication
from tests.parallel.pool import WorkerError, pool


def measure(megabytes: float) -> list[communication.Measured]:
    return communication.measure(megabytes, repeats=2)


def measure_with_a_fault(megabytes: float) -> None:
    """One rank gives another number than it should."""
    original = communication._filled
    wrong = 0.5 if dist.get_rank() == 1 else 0.0
    communication._filled = lambda count, value: original(count, value + wrong)
    try:
        communication.measure(megabytes, repeats=1)
    finally:
        communication._filled = original


def test_every_operation_is_right_and_timed() -> None:
    found = pool(3).run(measure, 0.1)
    assert [each.name for each in found[0]] == [
        "all-reduce",
        "all-gather",
        "reduce-scatter",
        "send to the next",
    ]
    for each in found[0]:
        assert each.seconds > 0 and each.bus_gb_per_second > 0 and abs(each.size - 1e5) < 12
    assert found[0] == found[1] == found[2]  # the slowest rank's time, known to all


def test_a_wrong_result_is_noticed() -> None:
    with pytest.raises(WorkerError, match="all-reduce gave a wrong result on 3 of 3 ranks"):
        pool(3).run(measure_with_a_fault, 0.1)
