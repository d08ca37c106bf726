"""A plan as text: a head, and tables with a line for each kind of rank."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from megatron_mesh.config.derived import layout, padded_vocab_size
from megatron_mesh.config.settings import flag
from megatron_mesh.planner.report import Plan, RankReport, ranks_text
from megatron_mesh.planner.saving import Disk, seconds
from megatron_mesh.planner.speed import Hardware
from megatron_mesh.planner.suggest import Suggestion
from megatron_mesh.recurrence import SCHEMES

_WITH_FLAGS = 3  # suggestions whose flags are written out

_MODEL_NOTE = """\
The times are a model's, not measured: computing at the given rate, all of the tensor-parallel communication,
states sent between pipeline ranks, and what data-parallel communication cannot hide behind a micro-batch.
Use them to compare layouts, and measure the first few. Of layouts with the same tensor, pipeline and
micro-batch size the fastest is shown. dist: distributed optimizer; SP: sequence parallelism."""

_NOTES = """\
Bytes are estimates from shapes; a framework's own and fragmentation come on top. Activations count in full
width where layers are in FP8; casts of their weights are among the weights (tensorwise) or the activations
(blockwise, delayed). The bubble is the share of the ranks' time in which they wait: 1 - busy / (ranks x
step), from the schedule's order with costs in FLOPs.
In flight: the most chunks whose activations a rank holds, and of how many micro-batches.
Checkpoint: with the optimizer's state. Saving needs host memory for a box of a tensor and its file; in the
background, for a copy of the rank's part as well.
Sent: by one GPU in a step; collectives as ring algorithms (of n bytes in a group of g, an all-gather or a
reduce-scatter sends n (g-1)/g, an all-reduce twice that)."""


def plan_text(plan: Plan, disk: Disk | None = None, gpus_per_node: int = 8) -> str:
    """Head, memory, traffic, and what the numbers mean."""
    rows = [*_head(plan), *saving_rows(plan, disk or Disk(), gpus_per_node)]
    width = max(len(label) for label, _ in rows)
    head = "\n".join(f"{label:<{width}}  {value}" for label, value in rows)
    return "\n\n".join([head, table(_memory_rows(plan)), table(_traffic_rows(plan)), _NOTES])


def saving_rows(plan: Plan, disk: Disk, gpus_per_node: int) -> list[tuple[str, str]]:
    """What a checkpoint takes, as labels and values.

    Args:
        gpus_per_node: ranks that share a host's memory; fewer if the run is smaller.
    """
    savings = [rank.saving for rank in plan.ranks]
    most = max(savings, key=lambda saving: saving.largest)
    on_host = min(gpus_per_node, plan.world_size)
    plain, copied = (most.host_memory(background=background) for background in (False, True))
    return [
        (
            "checkpoint",
            f"{size(sum(saving.together for saving in savings))}; at most {size(most.largest)} by a rank "
            f"(pipeline rank {savings.index(most)})",
        ),
        (
            "  host memory",
            f"{size(plain)} a rank while saving; with --async-save {size(copied)}, "
            f"{size(on_host * copied)} a host with {on_host}",
        ),
        (
            "  time to save",
            f"{seconds(savings, disk):,.1f} s at {disk.gb_per_s:g} GB/s of the file system and at most "
            f"{disk.rank_gb_per_s:g} GB/s of a rank",
        ),
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns two blanks apart, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def size(count: float) -> str:
    """Bytes with a unit that leaves at most four digits before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.2f} {unit}"


def suggestions_text(found: Sequence[Suggestion], hardware: Hardware, memory_gib: float) -> str:
    """Layouts as a table, the flags of the first ones, and what the times are worth."""
    head = [
        "",
        "tensor",
        "pipeline",
        "data",
        "micro-batch",
        "recompute",
        "layers",
        "step",
        "bubble",
        "memory",
    ]
    rows = [head, *([str(n), *_suggestion_row(s, hardware)] for n, s in enumerate(found, start=1))]
    rate = (
        f"{hardware.gpus} GPUs, {memory_gib:g} GiB of each to be used; {hardware.tflops:g} TFLOP/s, "
        f"{hardware.node_gb_per_s:g} GB/s within a node, {hardware.network_gb_per_s:g} GB/s beyond"
    )
    flags = [f"{n}: {_flags(s.settings)}" for n, s in enumerate(found[:_WITH_FLAGS], start=1)]
    return "\n\n".join([rate, table(rows), "\n".join(flags), _MODEL_NOTE])


def _suggestion_row(suggestion: Suggestion, hardware: Hardware) -> list[str]:
    parallel, training = suggestion.config.parallel, suggestion.config.training
    tensor, pipelined = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    placed = parallel.pipeline_model_parallel_layout or "even"
    if parallel.account_for_loss_in_pipeline_split:
        placed = "loss weighed in"
    if parallel.num_virtual_stages_per_pipeline_rank:
        placed = f"{parallel.num_virtual_stages_per_pipeline_rank} chunks"
    replicas = hardware.gpus // (tensor * pipelined)
    return [
        f"{tensor}{' SP' if parallel.sequence_parallel else ''}",
        str(pipelined),
        f"{replicas}{' dist' if parallel.use_distributed_optimizer else ''}",
        str(training.micro_batch_size),
        training.recompute_granularity or "none",
        placed if pipelined > 1 else "",
        f"{suggestion.seconds:.2f} s",
        f"{suggestion.bubble:.1%}",
        size(suggestion.memory),
    ]


def _flags(settings: Mapping[str, Any]) -> str:
    """Settings as a command line says them; what is unset or false is left out."""
    words = []
    for name, value in settings.items():
        if value is True:
            words.append(flag(name))
        elif value:
            words.append(f"{flag(name)} {' '.join(value) if isinstance(value, list) else value}")
    return " ".join(words)


def _head(plan: Plan) -> list[tuple[str, str]]:
    model, training = plan.config.model, plan.config.training
    stages, times = plan.pipeline, plan.timeline
    width = f"hidden {model.hidden_size:,}, vocabulary {padded_vocab_size(model):,}"
    ranks = f"{plan.world_size:,}: {ranks_text(plan)}"
    rows = [
        ("model", f"{model.recurrence} {layout(model)}, {width}, {model.seq_length:,} tokens"),
        ("GPUs", ranks),
        ("pipeline", _pipeline_text(plan)),
        ("micro-batches", f"{stages.micro_batches} of {training.micro_batch_size} per step and replica"),
        ("recomputation", training.recompute_granularity or "none"),
        ("precision", _precision_text(plan)),
    ]
    if stages.ranks > 1:
        formula = (stages.ranks - 1) / (stages.passes * stages.micro_batches)
        rows.append(
            (
                "bubble",
                f"{times.bubble_share:.1%} of the ranks' time, {times.imbalance:.1%} since their work is "
                f"unequal (chunks of equal cost: {formula / (1 + formula):.1%})",
            )
        )
    return rows


def _precision_text(plan: Plan) -> str:
    precision = plan.config.precision
    kind = "bfloat16" if plan.config.training.bf16 else "float32"
    if precision.fp8_format is None:
        return kind
    where = "all layers" if precision.fp8_scope == "all" else "the core"
    weights = ", weights too" if precision.fp8_param_gather else ""
    return f"{kind}; {where} in FP8 ({precision.fp8_format}, {precision.fp8_recipe}{weights})"


def _pipeline_text(plan: Plan) -> str:
    stages = plan.pipeline
    if stages.ranks == 1:
        return "none"
    if SCHEMES[plan.config.model.recurrence].has_loop:
        kind = f"a ring: {', '.join(chunk.name for chunk in stages.chunks[0])}"
    else:
        kind = f"{stages.passes} chunks per rank"
    return f"{kind}; groups of {stages.group}" if stages.group else kind


def _by_kind(plan: Plan) -> list[tuple[str, RankReport]]:
    """Neighbouring ranks with equal reports together, under the label ``0`` or ``1-3``."""
    found = []
    for report, members in groupby(enumerate(plan.ranks), key=lambda pair: pair[1]):
        numbers = [rank for rank, _ in members]
        label = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        found.append((label, report))
    return found


def _memory_rows(plan: Plan) -> list[list[str]]:
    head = ["pipeline rank", "layers", "parameters", "weights", "gradients", "optimizer", "activations"]
    rows = [[*head, "in all", "in flight", "busy"]]
    for label, rank in _by_kind(plan):
        memory = rank.memory
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
        held = f"{rank.in_flight.passes} of {rank.in_flight.micro_batches}"
        rows.append(
            [
                label,
                rank.layers,
                f"{rank.parameters:,}",
                *map(size, parts),
                held,
                f"{rank.busy_share:.1%}",
            ]
        )
    return rows


def _traffic_rows(plan: Plan) -> list[list[str]]:
    kinds = ["to next", "to previous", "tensor", "context", "gradients", "parameters", "tied weights"]
    rows = [["sent per step", *kinds, "in all"]]
    for label, rank in _by_kind(plan):
        rows.append([label, *(size(n) for n in vars(rank.traffic).values()), size(rank.traffic.total)])
    return rows
