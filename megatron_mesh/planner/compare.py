"""Compare the ring with the two other ways to run a looped model on a pipeline.

- one stage: one rank runs the whole loop, the ranks before it the prelude and those after it the coda. This
  is plain 1F1B with the best of the possible splits.
- copies: the unrolled layers are distributed like those of a plain model, so every loop has its own copy of
  the core. The gradients of the copies are summed after the backward. This is interleaved 1F1B.

The comparison favours these two. They would have to send the states that the recurrence stores to the stage
that reads them (the embedding, and with copies also every output of the core), which is not counted. FP8 is
left out, because its casts follow the same pattern as the weights.
"""

from collections.abc import Sequence
from dataclasses import replace

from megatron_mesh.config.layout import LayerLayout, layout
from megatron_mesh.config.placement import microbatch_group_size
from megatron_mesh.config.schema import Config, PrecisionConfig
from megatron_mesh.config.sizes import GRADIENT_BYTES, layer_parameters
from megatron_mesh.planner.plan import Plan, data_parallel_size, make_plan, plan_for
from megatron_mesh.planner.stages import Chunk, Pipeline, plain_pipeline
from megatron_mesh.planner.suggest import balanced_placement


def ring(config: Config, world_size: int) -> Plan:
    """Plan the ring, with the placement in the settings or else the best one found."""
    if config.parallel.pipeline_model_parallel_layout is None:
        parts = balanced_placement(config.model, config.parallel.pipeline_model_parallel_size)
        parallel = replace(config.parallel, pipeline_model_parallel_layout=str(parts))
        config = replace(config, parallel=parallel)
    return make_plan(config, world_size)


def one_stage(config: Config, world_size: int) -> Plan:
    """Plan the loop on one rank, the prelude on those before it and the coda on those after it."""
    ranks, layers = config.parallel.pipeline_model_parallel_size, layout(config.model)
    micro_batches = _micro_batches(config, world_size)
    plans = [
        plan_for(config, _loop_on(rank, ranks, layers, micro_batches), world_size) for rank in range(ranks)
    ]
    return min(plans, key=lambda plan: plan.timeline.step_time)


def _loop_on(loop: int, ranks: int, layers: LayerLayout, micro_batches: int) -> Pipeline:
    prelude = [*_even(layers.prelude, loop), 0] if loop else [layers.prelude]
    coda = [0, *_even(layers.coda, ranks - 1 - loop)] if loop < ranks - 1 else [layers.coda]
    loops, enters = (layers.core,) * layers.loops, tuple(range(layers.loops + 2))
    chunks = [
        *(Chunk("prelude", (n,)) for n in prelude[:-1]),
        Chunk("loop", (prelude[-1], *loops, coda[0]), enters),
        *(Chunk("coda", (n,)) for n in coda[1:]),
    ]
    chunks[0] = replace(chunks[0], embedding=True)
    chunks[-1] = replace(chunks[-1], head=True)
    unique = [chunk.layers for chunk in chunks]
    unique[loop] -= (layers.loops - 1) * layers.core
    return Pipeline(tuple((chunk,) for chunk in chunks), tuple(unique), micro_batches)


def _even(layers: int, ranks: int) -> list[int]:
    return [layers // ranks + (rank < layers % ranks) for rank in range(ranks)]


def core_copies(config: Config, world_size: int) -> Plan:
    """Plan a copy of the core for every loop, distributed like a plain model of the same depth."""
    ranks, layers = config.parallel.pipeline_model_parallel_size, layout(config.model)
    fitting = [v for v in range(1, layers.loops + 3) if layers.depth % (ranks * v) == 0]
    assert fitting, f"{layers.depth} unrolled layers do not divide over {ranks} ranks"
    virtual, micro_batches = fitting[-1], _micro_batches(config, world_size)
    group = microbatch_group_size(config.parallel, micro_batches) if virtual > 1 else None
    plain = plain_pipeline(layers.depth, ranks, virtual, micro_batches, group)
    homes = _homes(layers, ranks, layers.depth // (ranks * virtual))
    held = tuple(sum(rank in ranks_of for ranks_of in homes) for rank in range(ranks))
    plan = plan_for(config, _with_enters(replace(plain, layers=held), layers), world_size)
    size = layer_parameters(config.model, config.parallel.tensor_model_parallel_size) * GRADIENT_BYTES
    reports = []
    for rank, report in enumerate(plan.ranks):
        summed = sum(2 * size * (len(h) - 1) / len(h) for h in homes if rank in h)
        reports.append(replace(report, traffic=replace(report.traffic, ties=round(summed))))
    return replace(plan, ranks=tuple(reports))


def _homes(layers: LayerLayout, ranks: int, per_chunk: int) -> list[set[int]]:
    """Return, for every distinct layer, the ranks that hold a copy of it."""
    homes: dict[int, set[int]] = {}
    loop_end = layers.prelude + layers.core * layers.loops
    for unrolled in range(layers.depth):
        layer = unrolled
        if layers.prelude <= unrolled < loop_end:
            layer = layers.prelude + (unrolled - layers.prelude) % layers.core
        homes.setdefault(layer, set()).add(unrolled // per_chunk % ranks)
    return list(homes.values())


def _with_enters(stages: Pipeline, layers: LayerLayout) -> Pipeline:
    """Assign the making of each pass's input to the chunk with the pass's first layer."""
    ranks, per_chunk = stages.ranks, stages.chunks[0][0].layers
    chunks = [list(of_rank) for of_rank in stages.chunks]
    starts = [0, *(layers.prelude + t * layers.core for t in range(layers.loops + 1))]
    for index, start in enumerate(starts):
        number = min(start, layers.depth - 1) // per_chunk
        chunk = chunks[number % ranks][number // ranks]
        chunks[number % ranks][number // ranks] = replace(chunk, enters=(*chunk.enters, index))
    return replace(stages, chunks=tuple(map(tuple, chunks)))


def _micro_batches(config: Config, world_size: int) -> int:
    training = config.training
    assert training.global_batch_size is not None, "resolve() fills in global_batch_size"
    return training.global_batch_size // (training.micro_batch_size * data_parallel_size(config, world_size))


_COLUMNS = (
    "GPUs",
    "micro-batches",
    "pipeline",
    "parameters, M",
    "weights and optimizer, GiB",
    "activations, GiB",
    "waiting",
    "P2P, GiB",
    "copies, GiB",
    "data parallel, GiB",
)


def comparison_table(configs: Sequence[tuple[int, Config]]) -> str:
    """Format a Markdown table with three rows for each (number of GPUs, resolved configuration).

    Each column shows the rank with the largest value; traffic is what a rank sends per step.
    """
    ways = {"ring": ring, "loop on one stage": one_stage, "copies of the core": core_copies}
    lines = [" | ".join(["", *_COLUMNS, ""]).strip(), "|---" * len(_COLUMNS) + "|"]
    for gpus, config in configs:
        config = replace(config, precision=PrecisionConfig())
        for name, way in ways.items():
            plan = way(config, gpus)
            cells = [str(gpus), str(plan.pipeline.micro_batches), name, *_cells(plan)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(plan: Plan) -> list[str]:
    ranks, gib = plan.ranks, 2**30
    parameters = max(rank.parameters for rank in ranks) / 1e6
    permanent = max(rank.memory.total - rank.memory.activations for rank in ranks) / gib
    activations = max(rank.memory.activations for rank in ranks) / gib
    p2p = max(rank.traffic.p2p_forward + rank.traffic.p2p_backward for rank in ranks) / gib
    copied = max(rank.traffic.ties for rank in ranks) / gib
    data = max(rank.traffic.gradients + rank.traffic.parameters for rank in ranks) / gib
    return [
        f"{parameters:,.0f}",
        f"{permanent:.1f}",
        f"{activations:.1f}",
        f"{plan.timeline.bubble_share:.1%}",
        f"{p2p:.2f}",
        f"{copied:.2f}",
        f"{data:.2f}",
    ]
