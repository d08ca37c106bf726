"""Search for a placement whose ranks wait less than with the even one."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from megatron_mesh.config.derived import layout
from megatron_mesh.config.placement import Placement, placement
from megatron_mesh.config.schema import ModelConfig, ParallelConfig
from megatron_mesh.config.sizes import loss_in_layers
from megatron_mesh.planner.costs import Cost
from megatron_mesh.planner.order import rank_order
from megatron_mesh.planner.schedule import simulate

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
