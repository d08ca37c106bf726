"""Measure how long the ranks of a real pipeline wait, and compare it with what the planner predicts.

    torchrun --nproc-per-node 2 -m tools.bench.pipeline --config examples/configs/pythia-160m.yaml \\
        --pipeline-model-parallel-size 2 --seq-length 128 --micro-batch-size 1 --global-batch-size 8

All settings of pretrain_mesh.py are accepted; the data are random. The bubble is the share of the ranks' time
spent waiting, 1 - busy / (ranks x step). All ranks must be on one node.
"""

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

from megatron_mesh import command
from megatron_mesh.arguments import parse_args
from megatron_mesh.checkpoint.content import TrainState
from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import at_least
from megatron_mesh.errors import UserError
from megatron_mesh.parallel import build_stage
from megatron_mesh.planner.costs import Cost
from megatron_mesh.planner.plan import make_plan
from megatron_mesh.planner.schedule import Span, Step, Timeline, schedule_order, simulate
from megatron_mesh.planner.text import with_vocabulary
from megatron_mesh.runtime import device
from megatron_mesh.runtime.distributed import process_groups
from megatron_mesh.runtime.environment import rank_from_environment, world_size_from_environment
from megatron_mesh.train.optimizer import build_optimizer, build_schedule
from megatron_mesh.train.step import train_step
from tools.bench.variants import random_batches


@dataclass(frozen=True)
class Options:
    """Options besides the settings of pretrain_mesh.py."""

    steps: int = 10
    """Measured steps, after one warm-up step."""


def main(options: Options, settings: list[str]) -> None:
    """Measure, and print three numbers."""
    at_least(1, options, "steps")
    world_size = world_size_from_environment()
    config = resolve(parse_args(settings).config, world_size=world_size)
    if config.parallel.pipeline_model_parallel_size == 1:
        raise UserError(
            "there is no pipeline to measure; set --pipeline-model-parallel-size to 2 or more, and start as "
            "many processes with torchrun"
        )
    config = resolve(with_vocabulary(config), world_size=world_size)
    with process_groups(config):
        found = measure_bubble(config, options.steps)
    if rank_from_environment() == 0:
        print(
            f"bubble measured                        {found.measured:.1%}  (median of {options.steps} steps)"
        )
        print(f"bubble simulated with measured costs   {found.simulated:.1%}")
        print(f"bubble planned, with FLOPs as costs    {found.planned:.1%}")


@dataclass(frozen=True)
class Bubbles:
    """Share of the ranks' time spent waiting, 1 - busy / (ranks x step), found in three ways."""

    measured: float
    """In a real run, the median over its steps."""
    simulated: float
    """In the planner's simulation with the measured costs."""
    planned: float
    """In the planner's simulation with FLOPs as costs."""


@contextmanager
def recorded(spans: list[tuple[bool, float, float]]) -> Iterator[None]:
    """Record start and end of each forward and backward pass in Megatron's schedule on this rank."""
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
    """Run a warm-up step and ``steps`` measured ones on all ranks. Megatron's groups must exist.

    The ranks must be on one node, because their clocks are compared without correction. The loss counts with
    the chunk that computes it.
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
        timeline = Timeline(_gather_spans(spans, order))
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
    """Compute ``bubble_share`` for a clock that doesn't start at 0."""
    begin = min(spans[0].start for spans in timeline.spans)
    return 1 - sum(timeline.busy) / (len(timeline.spans) * (timeline.step_time - begin))


def _gather_spans(spans: list[tuple[bool, float, float]], order: Any) -> tuple[tuple[Span, ...], ...]:
    """Gather the spans of every rank of this pipeline with the steps of the schedule. Collective."""
    group = parallel_state.get_pipeline_model_parallel_group()
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, spans, group=group)
    return tuple(tuple(map(_span, steps, times)) for steps, times in zip(order, gathered, strict=True))


def _span(step: Step, times: tuple[bool, float, float]) -> Span:
    backward, start, end = times
    assert backward == step.backward, "Megatron's schedule runs in another order than the planner's"
    return Span(step, start, end)


if __name__ == "__main__":
    command.run(main, prints_errors=lambda: rank_from_environment() == 0)
