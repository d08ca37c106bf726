"""Everything about a run on paper: one ``Plan``, with a ``RankReport`` for each pipeline rank."""

from dataclasses import dataclass

from megatron_mesh.config.check_parallel import model_parallel_size
from megatron_mesh.config.schema import Config
from megatron_mesh.planner.costs import chunk_costs
from megatron_mesh.planner.layer_memory import MemoryEstimate
from megatron_mesh.planner.memory import InFlight, rank_memory
from megatron_mesh.planner.order import schedule_order
from megatron_mesh.planner.parameters import rank_parameters
from megatron_mesh.planner.saving import Saving, rank_saving
from megatron_mesh.planner.simulate import Timeline, simulate
from megatron_mesh.planner.stages import Pipeline, pipeline
from megatron_mesh.planner.traffic import Traffic, rank_traffic


@dataclass(frozen=True)
class RankReport:
    """One pipeline rank; all its tensor- and data-parallel ranks have the same numbers."""

    layers: str
    """Layers of each chunk."""
    parameters: int
    memory: MemoryEstimate
    in_flight: InFlight
    traffic: Traffic
    saving: Saving
    busy_share: float
    """Time in which it computes over the step's time."""


@dataclass(frozen=True)
class Plan:
    """A resolved run on ``world_size`` ranks."""

    config: Config
    world_size: int
    pipeline: Pipeline
    timeline: Timeline
    """In FLOPs of one tensor-parallel rank; communication takes no time in it."""
    ranks: tuple[RankReport, ...]

    @property
    def data_parallel(self) -> int:
        """Replicas of the model."""
        return data_parallel_size(self.config, self.world_size)


def data_parallel_size(config: Config, world_size: int) -> int:
    """Replicas of the model that a resolved run has."""
    return world_size // model_parallel_size(config.parallel)


def ranks_text(plan: Plan) -> str:
    """How the processes divide."""
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
        config: resolved for ``world_size``, with the size of the vocabulary.
    """
    return plan_for(config, pipeline(config, data_parallel_size(config, world_size)), world_size)


def plan_for(config: Config, stages: Pipeline, world_size: int) -> Plan:
    """The same for given stages, which need not be those that ``config`` would have."""
    order = schedule_order(stages)
    timeline = simulate(order, chunk_costs(config, stages))
    # The ranks that share a sequence have the same weights.
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
