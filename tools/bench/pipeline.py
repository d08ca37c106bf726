"""Where the ranks of a real pipeline wait, beside what the planner says."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules

from megatron_mesh.bench.variants import random_batches
from megatron_mesh.checkpoint.state import TrainState
from megatron_mesh.config.schema import Config
from megatron_mesh.parallel import build_stage
from megatron_mesh.planner.costs import Cost
from megatron_mesh.planner.order import Step, schedule_order
from megatron_mesh.planner.report import make_plan
from megatron_mesh.planner.simulate import Span, Timeline, simulate
from megatron_mesh.runtime import device
from megatron_mesh.train.optimizer import build_optimizer, build_schedule
from megatron_mesh.train.step import train_step


@dataclass(frozen=True)
class Bubbles:
    """Share of the ranks' time in which they wait, 1 - busy / (ranks x step), three ways."""

    measured: float
    """Median over the steps of a real run."""
    simulated: float
    """The planner's simulation with the costs that were measured."""
    planned: float
    """The planner's, with FLOPs as costs."""


@contextmanager
def recorded(spans: list[tuple[bool, float, float]]) -> Iterator[None]:
    """Note start and end of every forward and backward that Megatron's schedule runs on this rank."""
    originals = {False: schedules.forward_step, True: schedules.backward_step}

    def timed(backward: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            device.synchronize()
            start = time.time()
            result = originals[backward](*args, **kwargs)
            device.synchronize()
            spans.append((backward, start, time.time()))
            return result

        return call

    schedules.forward_step, schedules.backward_step = timed(False), timed(True)
    try:
        yield
    finally:
        schedules.forward_step, schedules.backward_step = originals[False], originals[True]


def measure_bubble(config: Config, steps: int) -> Bubbles:
    """Run ``steps`` steps after one to warm up, on all ranks of a world that has Megatron's groups.

    The ranks' clocks are compared as they are, so the ranks must be on one node. The head's loss counts
    with its chunk.
    """
    world, training = dist.get_world_size(), config.training
    plan = make_plan(config, world)
    stage = build_stage(config)
    optimizer = build_optimizer(config, stage)
    state = TrainState(build_schedule(config.optimizer, optimizer))
    batches = random_batches(
        plan.pipeline.micro_batches,
        training.micro_batch_size,
        config.model.seq_length,
        config.model.vocab_size or 0,
        training.seed + parallel_state.get_data_parallel_rank(),
    )
    order = schedule_order(plan.pipeline)
    shares, costs = [], defaultdict(list)
    for number in range(steps + 1):
        spans: list[tuple[bool, float, float]] = []
        dist.barrier()
        with recorded(spans):
            train_step(stage, optimizer, state, iter(batches), training)
        timeline = Timeline(_of_all_ranks(spans, order))
        if number:
            shares.append(_share(timeline))
            for rank, members in enumerate(timeline.spans):
                for span in members:
                    costs[rank, span.step.chunk, span.step.backward].append(span.end - span.start)
    typical = [
        [
            Cost(median(costs[rank, chunk, False]), median(costs[rank, chunk, True]))
            for chunk in range(len(row))
        ]
        for rank, row in enumerate(plan.pipeline.chunks)
    ]
    return Bubbles(median(shares), simulate(order, typical).bubble_share, plan.timeline.bubble_share)


def _share(timeline: Timeline) -> float:
    """``bubble_share`` where the clock does not start at 0."""
    begin = min(spans[0].start for spans in timeline.spans)
    return 1 - sum(timeline.busy) / (len(timeline.spans) * (timeline.step_time - begin))


def _of_all_ranks(spans: list[tuple[bool, float, float]], order: Any) -> tuple[tuple[Span, ...], ...]:
    """The spans of every rank of this rank's pipeline, with the steps they belong to; a collective."""
    group = parallel_state.get_pipeline_model_parallel_group()
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, spans, group=group)
    return tuple(tuple(map(_span, steps, times)) for steps, times in zip(order, gathered, strict=True))


def _span(step: Step, times: tuple[bool, float, float]) -> Span:
    backward, start, end = times
    assert backward == step.backward, "the schedule's order is not the planner's"
    return Span(step, start, end)
