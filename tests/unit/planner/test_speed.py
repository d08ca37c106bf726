"""Check estimated step times on hardware with round numbers."""

import pytest

from megatron_mesh.config.sizes import flops_per_token
from megatron_mesh.planner.plan import make_plan
from megatron_mesh.planner.schedule import Hardware, chunk_seconds, data_parallel_time, pipeline_time
from tests.helpers import tiny_config


def test_one_gpu_only_computes() -> None:
    config = tiny_config("mesh")
    stages = make_plan(config, 1).pipeline
    hardware = Hardware(1, 1, tflops=1e-3)
    times = pipeline_time(config, stages, hardware, chunk_seconds(config, stages, hardware))
    assert times.step_time == pytest.approx(8 * 16 * flops_per_token(config.model) / 1e9)


def test_gradients_take_longer_between_nodes() -> None:
    """At 4 GB/s within and 1 GB/s between nodes, two nodes take four times as long as one."""
    config = tiny_config("mesh", world_size=4)
    plan = make_plan(config, 4)
    times = []
    for nodes, gpus in ((1, 4), (2, 2)):
        hardware = Hardware(nodes, gpus, node_gb_per_s=4, network_gb_per_s=1)
        costs = chunk_seconds(config, plan.pipeline, hardware)
        times.append(data_parallel_time(config, plan.pipeline, hardware, costs, 4))
    assert times[1] == pytest.approx(4 * times[0])
    assert times[1] == pytest.approx(plan.ranks[0].traffic.gradients / 1e9)


def test_overlap_hides_a_micro_batch() -> None:
    plain = tiny_config("mesh", world_size=4)
    overlapped = tiny_config("mesh", world_size=4, overlap_grad_reduce=True)
    stages, hardware = make_plan(plain, 4).pipeline, Hardware(4, 1, tflops=1.0, network_gb_per_s=0.01)
    costs = chunk_seconds(plain, stages, hardware)
    whole = data_parallel_time(plain, stages, hardware, costs, 4)
    assert data_parallel_time(overlapped, stages, hardware, costs, 4) == pytest.approx(
        whole - costs[0][0].backward
    )
