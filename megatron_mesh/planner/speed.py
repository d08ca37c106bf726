"""Estimate the time of a step on given hardware, to compare rank layouts rather than to predict a run.

The estimate covers the pipeline and the data-parallel communication that doesn't overlap with it. The
optimizer's computation, data loading and checkpoints are left out.
"""

from dataclasses import dataclass

from megatron_mesh.config.schema import Config
from megatron_mesh.planner.costs import Cost, chunk_costs
from megatron_mesh.planner.order import schedule_order
from megatron_mesh.planner.schedule import Timeline, simulate
from megatron_mesh.planner.stages import Chunk, Pipeline
from megatron_mesh.planner.traffic import data_parallel_bytes, message_bytes, tensor_parallel_bytes


@dataclass(frozen=True)
class Hardware:
    """A cluster. The defaults are for H100 SXM nodes with one 400 Gbit/s port per GPU."""

    nodes: int = 1
    gpus_per_node: int = 8
    tflops: float = 400.0
    """TFLOP/s that a GPU sustains in a layer (data sheet: 989 dense bf16)."""
    node_gb_per_s: float = 300.0
    """GB/s that a GPU sends within its node (data sheet: 450 over NVLink)."""
    network_gb_per_s: float = 40.0
    """GB/s that a GPU sends to other nodes (data sheet: 50)."""
    latency_us: float = 10.0
    """Latency of a message to another pipeline rank, in microseconds."""

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return self.nodes * self.gpus_per_node

    def bytes_per_second(self, span: int) -> float:
        """Return the send rate in a group whose members lie within ``span`` consecutive ranks."""
        return 1e9 * (self.node_gb_per_s if span <= self.gpus_per_node else self.network_gb_per_s)


def chunk_seconds(config: Config, stages: Pipeline, hardware: Hardware) -> list[list[Cost]]:
    """Seconds [rank][chunk] of computation and of tensor-parallel communication, which don't overlap."""
    rate, link = hardware.tflops * 1e12, hardware.node_gb_per_s * 1e9

    def cost(flops: Cost, chunk: Chunk) -> Cost:
        sent = Cost(*tensor_parallel_bytes(config, chunk))
        return Cost(
            flops.forward / rate + sent.forward / link,
            flops.backward / rate + sent.backward / link,
        )

    return [
        list(map(cost, flops, chunks))
        for flops, chunks in zip(chunk_costs(config, stages), stages.chunks, strict=True)
    ]


def pipeline_time(config: Config, stages: Pipeline, hardware: Hardware, costs: list[list[Cost]]) -> Timeline:
    """Simulate the pipeline in seconds. Messages between pipeline ranks overlap with computation."""
    transfer = hardware.latency_us * 1e-6
    transfer += message_bytes(config) / hardware.bytes_per_second(hardware.gpus)
    return simulate(schedule_order(stages), costs, transfer)


def data_parallel_time(
    config: Config, stages: Pipeline, hardware: Hardware, costs: list[list[Cost]], data_parallel: int
) -> float:
    """Seconds that the slowest rank waits for gradients and parameters.

    With overlap, reducing gradients hides behind the last micro-batch's backward, and gathering parameters
    behind the first micro-batch's forward.
    """
    parallel = config.parallel
    link = hardware.bytes_per_second(parallel.tensor_model_parallel_size * data_parallel)
    slowest = 0.0
    for rank, chunks in enumerate(costs):
        sent = data_parallel_bytes(config, stages, rank, data_parallel)
        reduce, gather = (count / link for count in sent)
        if parallel.overlap_grad_reduce:
            reduce = max(0.0, reduce - sum(cost.backward for cost in chunks))
        if parallel.overlap_param_gather:
            gather = max(0.0, gather - sum(cost.forward for cost in chunks))
        slowest = max(slowest, reduce + gather)
    return slowest
