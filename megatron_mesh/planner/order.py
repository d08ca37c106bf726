"""The order in which Megatron-core's pipeline schedules run the chunks of a rank."""

from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from megatron_mesh.planner.stages import Pipeline


class Step(NamedTuple):
    """One forward or backward of a chunk for a micro-batch."""

    backward: bool
    chunk: int
    micro_batch: int


def schedule_order(pipeline: Pipeline) -> tuple[tuple[Step, ...], ...]:
    """The steps of every rank, in order.

    Warm-up forwards, then a forward and a backward in turn, then the backwards that are left: interleaved
    1F1B where a rank has several chunks, plain 1F1B where it has one (Megatron-core 0.16.1,
    ``pipeline_parallel/schedules.py``).
    """
    return tuple(
        rank_order(pipeline.ranks, rank, pipeline.passes, pipeline.micro_batches, pipeline.group)
        for rank in range(pipeline.ranks)
    )


@cache
def rank_order(ranks: int, rank: int, chunks: int, micro_batches: int, group: int | None) -> tuple[Step, ...]:
    """The steps of one rank; see ``schedule_order``."""
    # These are the calls of forward_backward_pipelining_with_interleaving, which keeps the rest inside.
    table = get_schedule_table(micro_batches, chunks, group or micro_batches)
    shape = SimpleNamespace(size=lambda: ranks, rank=lambda: rank)
    communicator = SimpleNamespace(
        pp_group=shape, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None
    )
    total, _, warmup, _ = get_pp_rank_microbatches(
        micro_batches, chunks, group, p2p_communicator=communicator
    )
    forwards = [Step(False, chunk, micro_batch) for micro_batch, chunk in table]
    backwards = [Step(True, chunks - 1 - chunk, micro_batch) for micro_batch, chunk in table]
    steady = [step for pair in zip(forwards[warmup:], backwards, strict=False) for step in pair]
    return (*forwards[:warmup], *steady, *backwards[total - warmup :])
