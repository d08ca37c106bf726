"""The order in which Megatron-core's pipeline schedules run a rank's chunks."""

from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from megatron_mesh.planner.stages import Pipeline


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
