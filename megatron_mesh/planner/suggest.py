"""Search for a placement whose ranks wait less than with the even one.

Suggest rank layouts that fit into a GPU's memory, fastest first by the estimate in ``speed.py``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from megatron_mesh.config.layout import layout
from megatron_mesh.config.placement import Placement, placement
from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.resolve.model import resolve_model
from megatron_mesh.config.schema import Config, ModelConfig, ParallelConfig
from megatron_mesh.config.settings import with_values
from megatron_mesh.config.sizes import loss_in_layers
from megatron_mesh.errors import UserError
from megatron_mesh.planner.costs import Cost
from megatron_mesh.planner.plan import data_parallel_size
from megatron_mesh.planner.rank_memory import rank_memory
from megatron_mesh.planner.schedule import (
    Hardware,
    chunk_seconds,
    data_parallel_time,
    pipeline_time,
    rank_order,
    schedule_order,
    simulate,
)
from megatron_mesh.planner.stages import Pipeline, pipeline
from megatron_mesh.recurrence import SCHEMES

_SECTIONS = ("prelude", "core", "coda")
_MICRO_BATCHES_PER_RANK = 6  # in the trial runs: enough to reach a steady state


def balanced_placement(model: ModelConfig, ranks: int) -> Placement:
    """Move single layers between ranks until no move makes the simulated step shorter.

    The search starts from the even placement that accounts for the loss. Equal sums per rank are not enough:
    every pass goes from rank to rank, and the rank with the longest share of a pass makes the others wait.
    """
    parallel = ParallelConfig(pipeline_model_parallel_size=ranks, account_for_loss_in_pipeline_split=True)
    best = placement(model, parallel)
    loops, loss = layout(model).loops, loss_in_layers(model)
    shortest = _trial(best, loops, loss)
    while True:
        times = {moved: _trial(moved, loops, loss) for moved in _neighbours(best)}
        nearest = min(times, key=times.__getitem__, default=best)
        if nearest == best or times[nearest] >= shortest * (1 - 1e-9):
            return best
        best, shortest = nearest, times[nearest]


def _neighbours(parts: Placement) -> Iterator[Placement]:
    """Yield the placements that differ by one layer's rank; every rank retains at least one core layer."""
    for name in _SECTIONS:
        counts = getattr(parts, name)
        for source, count in enumerate(counts):
            if count <= (name == "core"):
                continue
            for target in range(len(counts)):
                if target != source:
                    moved = list(counts)
                    moved[source] -= 1
                    moved[target] += 1
                    yield replace(parts, **{name: tuple(moved)})


@cache
def _trial(parts: Placement, loops: int, loss: float) -> float:
    """Simulate a step; return its time in units of one layer's forward."""
    ranks, passes = parts.ranks, loops + 2
    micro_batches = _MICRO_BATCHES_PER_RANK * ranks
    order = [rank_order(ranks, rank, passes, micro_batches, ranks) for rank in range(ranks)]
    costs = []
    for rank in range(ranks):
        layers: list[float] = [parts.prelude[rank], *[parts.core[rank]] * loops, parts.coda[rank]]
        layers[-1] += loss * (rank == ranks - 1)
        costs.append([Cost(n, 2 * n) for n in layers])
    return simulate(order, costs).step_time


_MICRO_BATCHES = (1, 2, 4, 8)
_MOST_BALANCED = 8  # beyond this many pipeline ranks, searching for a better placement takes seconds
_RECOMPUTE: tuple[dict[str, Any], ...] = (
    {"recompute_granularity": None, "recompute_modules": None},
    {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    {"recompute_granularity": "full", "recompute_modules": None},
)
_UNSET = {
    "pipeline_model_parallel_layout": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "num_virtual_stages_per_pipeline_rank": None,
    "microbatch_group_size_per_virtual_stage": None,
    "recompute_method": None,
    "recompute_num_layers": None,
}


@dataclass(frozen=True)
class Suggestion:
    """A rank layout that fits."""

    config: Config
    settings: dict[str, Any]
    """The chosen settings by name."""
    seconds: float
    """Estimated time of a step."""
    bubble: float
    """Share of that time that pipeline ranks spend waiting."""
    memory: int
    """Bytes on the fullest rank."""


@dataclass(frozen=True)
class _Fitting:
    config: Config
    settings: dict[str, Any]
    stages: Pipeline
    memory: int


def suggest(
    config: Config,
    hardware: Hardware,
    memory_bytes: int,
    limit: int = 10,
) -> list[Suggestion]:
    """Return the ``limit`` fastest layouts, at most one per (tensor, pipeline, micro-batch size).

    Args:
        config: a run as given on the command line (not resolved); its rank layout is ignored.
        memory_bytes: the memory that a rank may use.

    Raises:
        UserError: nothing fits, or the global batch size is unknown.
    """
    if config.training.global_batch_size is None:
        raise UserError("--suggest compares rank layouts at one global batch size; set --global-batch-size")
    config = replace(config, model=resolve_model(config.model))
    fitting, least = _fitting(config, hardware, memory_bytes)
    if not fitting:
        if least == math.inf:  # no layout is valid at all; resolving the simplest one raises the reason
            resolve(with_values(config, _UNSET), world_size=hardware.gpus)
        raise UserError(
            f"no rank layout on {hardware.gpus} GPUs fits into {memory_bytes / 2**30:.1f} GiB per GPU; the "
            f"smallest needs {least / 2**30:.1f} GiB; use more nodes or a smaller model"
        )
    return _fastest(fitting, hardware, limit)


def layout_candidates(config: Config, hardware: Hardware) -> Iterator[dict[str, Any]]:
    """Yield the settings of every layout, including invalid ones, which ``resolve`` rejects."""
    for tensor, pipelined in product(_divisors(hardware.gpus_per_node), _divisors(hardware.gpus)):
        if hardware.gpus % (tensor * pipelined):
            continue
        replicas = hardware.gpus // (tensor * pipelined)
        for placed, sharded, optimizer, micro_batch in product(
            _placements(config, pipelined),
            (False, True) if tensor > 1 else (False,),
            (False, True) if replicas > 1 else (False,),
            _MICRO_BATCHES,
        ):
            yield {
                "tensor_model_parallel_size": tensor,
                "pipeline_model_parallel_size": pipelined,
                **placed,
                "sequence_parallel": sharded,
                "use_distributed_optimizer": optimizer,
                "overlap_grad_reduce": replicas > 1,
                "overlap_param_gather": optimizer,
                "micro_batch_size": micro_batch,
            }


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _placements(config: Config, ranks: int) -> list[dict[str, Any]]:
    """List settings for the placement: even, accounting for the loss, or searched; or virtual stages."""
    if ranks == 1:
        return [{}]
    if not SCHEMES[config.model.recurrence].has_loop:
        return [{"num_virtual_stages_per_pipeline_rank": n} for n in (1, 2, 4)]
    if ranks > layout(config.model).core:
        return []
    placed: list[dict[str, Any]] = [{}, {"account_for_loss_in_pipeline_split": True}]
    if ranks <= _MOST_BALANCED:
        placed.append({"pipeline_model_parallel_layout": str(balanced_placement(config.model, ranks))})
    return placed


def _fitting(config: Config, hardware: Hardware, memory_bytes: int) -> tuple[list[_Fitting], float]:
    """Return every layout that fits, with the least recomputation, and the least memory that any needs."""
    found, least = [], math.inf
    for settings in layout_candidates(config, hardware):
        for recompute in _RECOMPUTE:
            chosen = {**settings, **recompute}
            try:
                resolved = resolve(with_values(config, {**_UNSET, **chosen}), world_size=hardware.gpus)
            except UserError:
                break  # this layout is invalid for this model and batch
            replicas = data_parallel_size(resolved, hardware.gpus)
            stages = pipeline(resolved, replicas)
            needed = _fullest_rank(resolved, stages, replicas)
            least = min(least, needed)
            if needed <= memory_bytes:
                found.append(_Fitting(resolved, chosen, stages, needed))
                break
    return found, least


def _fullest_rank(config: Config, stages: Pipeline, replicas: int) -> int:
    orders = enumerate(schedule_order(stages))
    return max(rank_memory(config, stages, rank, order, replicas)[0].total for rank, order in orders)


def _fastest(fitting: Sequence[_Fitting], hardware: Hardware, limit: int) -> list[Suggestion]:
    """Simulate the layouts in order of their lower bounds until no later one can be among the fastest."""
    bounds = [(_least_seconds(layout, hardware), i) for i, layout in enumerate(fitting)]
    best: dict[tuple[int, int, int], Suggestion] = {}
    for bound, i in sorted(bounds):
        ranking = sorted(best.values(), key=lambda s: s.seconds)
        if len(ranking) >= limit and bound >= ranking[limit - 1].seconds:
            break
        candidate = _simulated(fitting[i], hardware)
        parallel = candidate.config.parallel
        kind = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            candidate.config.training.micro_batch_size,
        )
        if kind not in best or candidate.seconds < best[kind].seconds:
            best[kind] = candidate
    return sorted(best.values(), key=lambda s: s.seconds)[:limit]


def _least_seconds(layout: _Fitting, hardware: Hardware) -> float:
    """Return a lower bound on a step's time: the busiest rank's work, as if it never waited."""
    costs = chunk_seconds(layout.config, layout.stages, hardware)
    return layout.stages.micro_batches * max(sum(map(sum, rank)) for rank in costs)


def _simulated(layout: _Fitting, hardware: Hardware) -> Suggestion:
    config, stages = layout.config, layout.stages
    costs = chunk_seconds(config, stages, hardware)
    times = pipeline_time(config, stages, hardware, costs)
    replicas = data_parallel_size(config, hardware.gpus)
    exposed = data_parallel_time(config, stages, hardware, costs, replicas)
    return Suggestion(
        config=config,
        settings=layout.settings,
        seconds=times.step_time + exposed,
        bubble=times.bubble_share,
        memory=layout.memory,
    )
