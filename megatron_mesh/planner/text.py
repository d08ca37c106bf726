"""Format plans and suggestions as text: a summary, then tables with one row per kind of rank.

Describe a run before it touches a device: the text of ``--dry-run``.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from megatron_mesh.config.layout import batch_sizes, last_sample, last_step, layout, padded_vocab_size
from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.schema import Config, ParallelConfig
from megatron_mesh.config.settings import flag
from megatron_mesh.config.sizes import flops_per_token
from megatron_mesh.errors import UserError
from megatron_mesh.model import build_on_meta
from megatron_mesh.model.build import count_parameters
from megatron_mesh.planner.plan import Plan, RankReport, make_plan, ranks_text
from megatron_mesh.planner.rank_memory import Disk, save_seconds
from megatron_mesh.planner.schedule import Hardware
from megatron_mesh.planner.suggest import Suggestion
from megatron_mesh.recurrence import SCHEMES

_WITH_FLAGS = 3  # number of suggestions that are followed by their flags

_SUGGESTION_NOTES = """\
Step times are estimates, not measurements. They add up computation at the given rate, tensor-parallel
communication, messages between pipeline ranks, and data-parallel communication that doesn't overlap with
a micro-batch. Use them to compare rank layouts, then measure the first few. For each combination of tensor,
pipeline and micro-batch size only the fastest layout is shown.
dist: distributed optimizer; SP: sequence parallelism."""

_NOTES = """\
Memory is estimated from shapes; CUDA, NCCL, the framework and fragmentation add to it. Activations of FP8
layers are counted at full width. FP8 casts of weights count as weights (tensorwise) or as activations
(blockwise, delayed).
Bubble: the share of the ranks' time that they spend waiting, 1 - busy / (ranks x step), from simulating the
schedule with FLOPs as costs.
In flight: the largest number of chunks whose activations a rank stores at once, and the number of
micro-batches that they belong to.
Checkpoint: includes the optimizer state. A save copies one piece of a tensor at a time to host memory; a
background save copies everything that the rank writes.
Sent per step: by one GPU. Collectives are counted as ring algorithms: for n bytes in a group of g ranks, an
all-gather or reduce-scatter sends n (g-1)/g, an all-reduce twice that."""


def plan_text(plan: Plan, disk: Disk | None = None, gpus_per_node: int = 8) -> str:
    """Format a plan: summary, memory table, traffic table, and notes on what the numbers mean."""
    rows = [*_summary(plan), *saving_rows(plan, disk or Disk(), gpus_per_node)]
    width = max(len(label) for label, _ in rows)
    summary = "\n".join(f"{label:<{width}}  {value}" for label, value in rows)
    return "\n\n".join([summary, format_table(_memory_rows(plan)), format_table(_traffic_rows(plan)), _NOTES])


def saving_rows(plan: Plan, disk: Disk, gpus_per_node: int) -> list[tuple[str, str]]:
    """Return the rows (label, value) on the cost of a checkpoint.

    Args:
        gpus_per_node: the ranks that share a host's memory, unless the run is smaller.
    """
    savings = [rank.saving for rank in plan.ranks]
    most = max(savings, key=lambda saving: saving.largest)
    on_host = min(gpus_per_node, plan.world_size)
    plain, copied = (most.host_memory(background=background) for background in (False, True))
    return [
        (
            "checkpoint",
            f"{size(sum(saving.total for saving in savings))}; at most {size(most.largest)} per rank "
            f"(on pipeline rank {savings.index(most)})",
        ),
        (
            "  host memory",
            f"{size(plain)} per rank while saving; {size(copied)} with --async-save, "
            f"or {size(on_host * copied)} per host with {on_host} {'rank' if on_host == 1 else 'ranks'}",
        ),
        (
            "  time to save",
            f"{save_seconds(savings, disk):,.1f} s at {disk.gb_per_s:g} GB/s for the file system and at most "
            f"{disk.rank_gb_per_s:g} GB/s per rank",
        ),
    ]


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Align rows in columns: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def size(count: float) -> str:
    """Format bytes in the unit that leaves at most four digits before the decimal point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.2f} {unit}"


def suggestions_text(found: Sequence[Suggestion], hardware: Hardware, memory_gib: float) -> str:
    """Format the layouts as a table, followed by the flags of the first few and notes."""
    header = [
        "",
        "tensor",
        "pipeline",
        "data",
        "micro-batch",
        "recompute",
        "placement",
        "step",
        "bubble",
        "memory",
    ]
    rows = [header, *([str(n), *_suggestion_row(s, hardware)] for n, s in enumerate(found, start=1))]
    rate = (
        f"{hardware.gpus} GPUs with {memory_gib:g} GiB and {hardware.tflops:g} TFLOP/s each; "
        f"{hardware.node_gb_per_s:g} GB/s within a node, {hardware.network_gb_per_s:g} GB/s between nodes"
    )
    flags = [f"{n}: {_flags(s.settings)}" for n, s in enumerate(found[:_WITH_FLAGS], start=1)]
    return "\n\n".join([rate, format_table(rows), "\n".join(flags), _SUGGESTION_NOTES])


def _suggestion_row(suggestion: Suggestion, hardware: Hardware) -> list[str]:
    parallel, training = suggestion.config.parallel, suggestion.config.training
    tensor, pipelined = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    placed = parallel.pipeline_model_parallel_layout or "even"
    if parallel.account_for_loss_in_pipeline_split:
        placed = "accounts for loss"
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
    """Format settings as command-line flags, leaving out those that are unset or false."""
    words = []
    for name, value in settings.items():
        if value is True:
            words.append(flag(name))
        elif value:
            words.append(f"{flag(name)} {' '.join(value) if isinstance(value, list) else value}")
    return " ".join(words)


def _summary(plan: Plan) -> list[tuple[str, str]]:
    model, training = plan.config.model, plan.config.training
    stages, times = plan.pipeline, plan.timeline
    width = f"hidden {model.hidden_size:,}, vocabulary {padded_vocab_size(model):,}"
    ranks = f"{plan.world_size:,}: {ranks_text(plan)}"
    rows = [
        ("model", f"{model.recurrence} {layout(model)}, {width}, sequence length {model.seq_length:,}"),
        ("ranks", ranks),
        ("pipeline", _pipeline_text(plan)),
        (
            "micro-batches",
            f"{stages.micro_batches} per step and replica, of size {training.micro_batch_size}",
        ),
        ("recomputation", training.recompute_granularity or "none"),
        ("precision", _precision_text(plan)),
    ]
    if stages.ranks > 1:
        formula = (stages.ranks - 1) / (stages.chunks_per_rank * stages.micro_batches)
        rows.append(
            (
                "bubble",
                f"{times.bubble_share:.1%} of the ranks' time ({times.imbalance:.1%} from unequal work; "
                f"equal chunks would give {formula / (1 + formula):.1%})",
            )
        )
    return rows


def _precision_text(plan: Plan) -> str:
    precision = plan.config.precision
    kind = "bfloat16" if plan.config.training.bf16 else "float32"
    if precision.fp8_format is None:
        return kind
    where = "all layers" if precision.fp8_scope == "all" else "the core"
    weights = ", weights stored in FP8" if precision.fp8_param_gather else ""
    return f"{kind}; {where} in FP8 ({precision.fp8_format}, {precision.fp8_recipe}{weights})"


def _pipeline_text(plan: Plan) -> str:
    stages = plan.pipeline
    if stages.ranks == 1:
        return "none"
    if SCHEMES[plan.config.model.recurrence].has_loop:
        kind = (
            f"ring of {stages.chunks_per_rank} passes: {', '.join(chunk.name for chunk in stages.chunks[0])}"
        )
    else:
        kind = f"{stages.chunks_per_rank} chunks per rank"
    return f"{kind}; micro-batches in groups of {stages.group}" if stages.group else kind


def _by_kind(plan: Plan) -> list[tuple[str, RankReport]]:
    """Merge neighbouring ranks with equal reports under a label such as ``0`` or ``1-3``."""
    found = []
    for report, members in groupby(enumerate(plan.ranks), key=lambda pair: pair[1]):
        numbers = [rank for rank, _ in members]
        label = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        found.append((label, report))
    return found


def _memory_rows(plan: Plan) -> list[list[str]]:
    head = ["pipeline rank", "layers", "parameters", "weights", "gradients", "optimizer", "activations"]
    rows = [[*head, "total", "in flight", "micro-batches", "busy"]]
    for label, rank in _by_kind(plan):
        memory = rank.memory
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
        rows.append(
            [
                label,
                rank.layers,
                f"{rank.parameters:,}",
                *map(size, parts),
                str(rank.in_flight.chunks),
                str(rank.in_flight.micro_batches),
                f"{rank.busy_share:.1%}",
            ]
        )
    return rows


def _traffic_rows(plan: Plan) -> list[list[str]]:
    kinds = ["to next", "to previous", "tensor", "context", "gradients", "parameters", "tied weights"]
    rows = [["sent per step", *kinds, "total"]]
    for label, rank in _by_kind(plan):
        rows.append([label, *(size(n) for n in vars(rank.traffic).values()), size(rank.traffic.total)])
    return rows


_RANKS_PER_NODE = 8
_EMBEDDINGS = ("embedding", "output projection")


def dry_run_text(config: Config, world_size: int = 1) -> str:
    """Describe a resolved run on ``world_size`` ranks.

    Raises:
        UserError: the vocabulary size is not set, and there is no readable tokenizer to take it from.
    """
    config = resolve(with_vocabulary(config), world_size=world_size)
    one_rank = replace(config, parallel=ParallelConfig())
    counts = count_parameters(build_on_meta(one_rank))
    plan = make_plan(config, world_size)
    rows = [*_model_rows(config), *_parameter_rows(counts), *_run_rows(plan), *_model_memory_rows(plan)]
    rows += saving_rows(plan, Disk(), _RANKS_PER_NODE)
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def with_vocabulary(config: Config) -> Config:
    """Return ``config`` with the vocabulary size set, from its tokenizer if necessary."""
    if config.model.vocab_size is not None:
        return config
    from megatron_mesh.data import build_tokenizer

    if config.data.tokenizer_model is None:
        raise UserError("the vocabulary size is unknown; set --tokenizer-model or --vocab-size")
    tokenizer = build_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)
    return replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))


def _model_rows(config: Config) -> list[tuple[str, str]]:
    model, layers = config.model, layout(config.model)
    scheme = SCHEMES[model.recurrence]
    depth = f"{layers.depth} layers, {layers.unique_layers} distinct"
    rows = [
        ("recurrence", f"{model.recurrence}: {scheme.formula}"),
        ("layers", f"{layers} (unrolled: {depth})"),
    ]
    if scheme.uses_memory:
        rows.append(("memory", f"{model.mesh_slots} slots, {layers.loops + 1} pairs of routers"))
    rows.append(
        (
            "width",
            f"hidden {model.hidden_size:,}, {model.num_attention_heads} heads, MLP {model.ffn_hidden_size:,}",
        )
    )
    rows.append(("vocabulary", f"{model.vocab_size:,}, padded to {padded_vocab_size(model):,}"))
    return rows


def _parameter_rows(counts: Counter[str]) -> list[tuple[str, str]]:
    rows = [("parameters", f"{counts.total():,}")]
    body = sum(n for part, n in counts.items() if part not in _EMBEDDINGS)
    rows.append(("  non-embedding", f"{body:,}"))
    rows += [(f"  {part}", f"{count:,}") for part, count in counts.items()]
    return rows


def _run_rows(plan: Plan) -> list[tuple[str, str]]:
    training, model = plan.config.training, plan.config.model
    assert training.global_batch_size is not None
    per_step = training.global_batch_size * model.seq_length
    tokens = last_sample(training) * model.seq_length
    flops = flops_per_token(model)
    rampup = []
    if training.rampup_batch_size:
        sizes, samples = batch_sizes(training), training.rampup_batch_size[2]
        growth = f"{sizes[0]:,} to {sizes[-1]:,} in {len(sizes) - 1} increments, over {samples:,} samples"
        rampup = [("batch size", growth)]
    return [
        ("ranks", f"{plan.world_size}: {ranks_text(plan)}"),
        (
            "micro-batches",
            f"{plan.pipeline.micro_batches} per step and replica, of size {training.micro_batch_size}",
        ),
        ("tokens per step", f"{per_step:,} ({training.global_batch_size:,} x {model.seq_length:,})"),
        *rampup,
        ("steps", f"{last_step(training):,} ({tokens:,} tokens)"),
        ("FLOPs per token", f"{flops:,.0f} (forward and backward, unrolled)"),
        ("FLOPs in total", f"{flops * tokens:.3e}"),
    ]


def _model_memory_rows(plan: Plan) -> list[tuple[str, str]]:
    memory = max((rank.memory for rank in plan.ranks), key=lambda memory: memory.total)

    return [
        ("memory of the fullest rank", f"{size(memory.total)} (estimate)"),
        ("  weights", size(memory.weights)),
        ("  gradients", size(memory.gradients)),
        ("  optimizer", size(memory.optimizer)),
        ("  activations", size(memory.activations)),
    ]
