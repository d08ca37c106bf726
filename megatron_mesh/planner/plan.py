"""Plan a whole run: a ``Plan`` with a ``RankReport`` for each pipeline rank."""

from dataclasses import dataclass

from megatron_mesh.config.resolve.parallel import model_parallel_size
from megatron_mesh.config.schema import Config
from megatron_mesh.planner.costs import Traffic, chunk_costs, rank_parameters, rank_traffic
from megatron_mesh.planner.rank_memory import InFlight, MemoryEstimate, Saving, rank_memory, rank_saving
from megatron_mesh.planner.schedule import Timeline, schedule_order, simulate
from megatron_mesh.planner.stages import Pipeline, pipeline


@dataclass(frozen=True)
class RankReport:
    """The numbers of one pipeline rank, which hold for each of its tensor- and data-parallel ranks."""

    layers: str
    """Number of layers in each chunk, separated by commas."""
    parameters: int
    memory: MemoryEstimate
    in_flight: InFlight
    traffic: Traffic
    saving: Saving
    busy_share: float
    """Share of the step that the rank spends computing."""


@dataclass(frozen=True)
class Plan:
    """A resolved run on ``world_size`` ranks."""

    config: Config
    world_size: int
    pipeline: Pipeline
    timeline: Timeline
    """In FLOPs of one tensor-parallel rank; communication takes no time."""
    ranks: tuple[RankReport, ...]

    @property
    def data_parallel(self) -> int:
        """Number of model replicas."""
        return data_parallel_size(self.config, self.world_size)


def data_parallel_size(config: Config, world_size: int) -> int:
    """Return the number of model replicas of a resolved run."""
    return world_size // model_parallel_size(config.parallel)


def ranks_text(plan: Plan) -> str:
    """Format the rank layout, e.g. ``tensor 2 x pipeline 4 x data 4``."""
    parallel = plan.config.parallel
    shared = parallel.context_parallel_size
    context = f"context {shared} x " if shared > 1 else ""
    return (
        f"tensor {parallel.tensor_model_parallel_size} x {context}pipeline {plan.pipeline.ranks} x "
        f"data {plan.data_parallel}"
    )


def make_plan(config: Config, world_size: int) -> Plan:
    """Plan a run.

    Args:
        config: resolved for ``world_size``, with a known vocabulary size.
    """
    return plan_for(config, pipeline(config, data_parallel_size(config, world_size)), world_size)


def plan_for(config: Config, stages: Pipeline, world_size: int) -> Plan:
    """Plan a run on the given pipeline, which may differ from the one that ``config`` describes."""
    order = schedule_order(stages)
    timeline = simulate(order, chunk_costs(config, stages))
    # Context-parallel ranks hold the same weights.
    replicas = data_parallel_size(config, world_size) * config.parallel.context_parallel_size

    def rank_report(rank: int) -> RankReport:
        memory, held = rank_memory(config, stages, rank, order[rank], replicas)
        return RankReport(
            layers=",".join(str(chunk.layers) for chunk in stages.chunks[rank]),
            parameters=rank_parameters(config, stages, rank),
            memory=memory,
            in_flight=held,
            traffic=rank_traffic(config, stages, rank, replicas),
            saving=rank_saving(config, stages, rank, replicas),
            busy_share=timeline.busy[rank] / timeline.step_time,
        )

    return Plan(config, world_size, stages, timeline, tuple(map(rank_report, range(stages.ranks))))
