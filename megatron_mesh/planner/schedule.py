"""The order in which Megatron-core's pipeline schedules run a rank's chunks.

Simulate a training step: every rank follows its order and waits for its neighbours' messages.

Estimate the time of a step on given hardware, to compare rank layouts rather than to predict a run.

The estimate covers the pipeline and the data-parallel communication that doesn't overlap with it. The
optimizer's computation, data loading and checkpoints are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from megatron_mesh.config.schema import Config
from megatron_mesh.planner.costs import (
    Cost,
    chunk_costs,
    data_parallel_bytes,
    message_bytes,
    tensor_parallel_bytes,
)
from megatron_mesh.planner.stages import Chunk, Pipeline


class Step(NamedTuple):
    """One forward or backward of a chunk for one micro-batch."""

    backward: bool
    chunk: int
    micro_batch: int


def schedule_order(pipeline: Pipeline) -> tuple[tuple[Step, ...], ...]:
    """List the steps of every rank.

    Each rank runs warm-up forwards, then alternates forwards and backwards, then runs the remaining
    backwards. This is interleaved 1F1B if a rank has several chunks, otherwise plain 1F1B (Megatron-core
    0.16.1, ``pipeline_parallel/schedules.py``).
    """
    return tuple(
        rank_order(pipeline.ranks, rank, pipeline.chunks_per_rank, pipeline.micro_batches, pipeline.group)
        for rank in range(pipeline.ranks)
    )


@cache
def rank_order(ranks: int, rank: int, chunks: int, micro_batches: int, group: int | None) -> tuple[Step, ...]:
    """List the steps of one rank; see ``schedule_order``."""
    # forward_backward_pipelining_with_interleaving calls these helpers too; the rest is inlined there.
    table = get_schedule_table(micro_batches, chunks, group or micro_batches)
    pp_group = SimpleNamespace(size=lambda: ranks, rank=lambda: rank)
    communicator = SimpleNamespace(
        pp_group=pp_group, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None
    )
    total, _, warmup, _ = get_pp_rank_microbatches(
        micro_batches, chunks, group, p2p_communicator=communicator
    )
    forwards = [Step(False, chunk, micro_batch) for micro_batch, chunk in table]
    backwards = [Step(True, chunks - 1 - chunk, micro_batch) for micro_batch, chunk in table]
    steady = [step for pair in zip(forwards[warmup:], backwards, strict=False) for step in pair]
    return (*forwards[:warmup], *steady, *backwards[total - warmup :])


class Span(NamedTuple):
    """When a rank runs a step."""

    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of every rank in order, in the unit of the costs."""

    spans: tuple[tuple[Span, ...], ...]

    @property
    def step_time(self) -> float:
        """Time from the first forward to the end of the last backward on any rank."""
        return max(spans[-1].end for spans in self.spans)

    @property
    def busy(self) -> tuple[float, ...]:
        """Time that each rank spends computing."""
        return tuple(sum(span.end - span.start for span in spans) for spans in self.spans)

    @property
    def bubble_share(self) -> float:
        """Share of the ranks' time that they spend waiting: 1 - sum(busy) / (ranks x step time)."""
        return 1 - sum(self.busy) / (len(self.spans) * self.step_time)

    @property
    def imbalance(self) -> float:
        """Part of the bubble that comes from unequal work: 1 - mean(busy) / max(busy)."""
        return 1 - sum(self.busy) / (len(self.spans) * max(self.busy))

    @property
    def bubble_over_compute(self) -> float:
        """Ratio of waiting to computing: ranks x step time / sum(busy) - 1.

        If all chunks cost the same, this is (P-1) / (V m) for P ranks with V chunks each and m micro-batches
        (arXiv 2104.04473, sec. 2.2).
        """
        return len(self.spans) * self.step_time / sum(self.busy) - 1


def simulate(
    order: Sequence[Sequence[Step]], costs: Sequence[Sequence[Cost]], transfer: float = 0.0
) -> Timeline:
    """Run every rank's steps as early as its order and its inputs allow.

    A chunk's forward needs the output of the previous rank (on rank 0: of the last rank, one pass earlier).
    Its backward needs the gradient from the next rank. Messages are buffered, as with overlapped
    communication, so no sender waits for its receiver.

    Args:
        order: the steps of each rank.
        costs: [rank][chunk], in any unit of time.
        transfer: time from the end of a step until its result arrives on another rank.
    """
    ranks, last_chunk = len(order), len(costs[0]) - 1
    spans: list[list[Span]] = [[] for _ in range(ranks)]
    ends: dict[tuple[int, Step], float] = {}
    total = sum(map(len, order))
    while len(ends) < total:
        before = len(ends)
        for rank, steps in enumerate(order):
            done = spans[rank]
            while len(done) < len(steps):
                step = steps[len(done)]
                start = done[-1].end if done else 0.0
                source = _needs(rank, step, ranks, last_chunk)
                if source is not None:
                    if source not in ends:
                        break
                    start = max(start, ends[source] + (transfer if source[0] != rank else 0.0))
                cost = costs[rank][step.chunk]
                end = start + (cost.backward if step.backward else cost.forward)
                done.append(Span(step, start, end))
                ends[rank, step] = end
        assert len(ends) > before, "deadlock: the schedule's order waits for itself"
    return Timeline(tuple(map(tuple, spans)))


def _needs(rank: int, step: Step, ranks: int, last_chunk: int) -> tuple[int, Step] | None:
    """Return the step whose result this step needs, with its rank; None for the first chunk's forward."""
    backward, chunk, _ = step
    if not backward:
        if rank > 0:
            return rank - 1, step
        return (ranks - 1, step._replace(chunk=chunk - 1)) if chunk > 0 else None
    if rank < ranks - 1:
        return rank + 1, step
    if chunk < last_chunk:
        return 0, step._replace(chunk=chunk + 1)
    return rank, step._replace(backward=False)


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
