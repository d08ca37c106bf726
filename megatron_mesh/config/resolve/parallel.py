"""Checks of the rank layout. They refuse what can't work before any process group exists."""

import math

from megatron_mesh.config.layout import batch_sizes, layout, padded_vocab_size
from megatron_mesh.config.placement import Placement, microbatch_group_size, placement
from megatron_mesh.config.schema import ModelConfig, ParallelConfig, TrainingConfig
from megatron_mesh.config.settings import at_least, flag, positive
from megatron_mesh.errors import UserError
from megatron_mesh.recurrence import SCHEMES


def check_ranks(parallel: ParallelConfig, world_size: int) -> int:
    """Check that the processes divide into groups that each hold a model; return the data-parallel size."""
    at_least(1, parallel, "tensor_model_parallel_size", "pipeline_model_parallel_size")
    at_least(1, parallel, "context_parallel_size", "num_virtual_stages_per_pipeline_rank")
    at_least(1, parallel, "microbatch_group_size_per_virtual_stage", "ddp_bucket_size")
    at_least(0, parallel, "watchdog_timeout_minutes")
    positive(parallel, "distributed_timeout_minutes")
    if parallel.watchdog_timeout_minutes >= parallel.distributed_timeout_minutes:
        raise UserError(
            f"--watchdog-timeout-minutes {parallel.watchdog_timeout_minutes:g} must be below "
            f"--distributed-timeout-minutes {parallel.distributed_timeout_minutes:g}; otherwise ranks that "
            "wait for a hung rank fail before the watchdog can name it"
        )
    size = model_parallel_size(parallel)
    if world_size % size:
        below = world_size // size * size
        near = [str(n) for n in (below, below + size) if n]
        sizes = " x ".join(f"{flag(n)} {getattr(parallel, n)}" for n in model_parallel_names(parallel))
        raise UserError(
            f"{sizes} = {size} does not divide the number of processes, {world_size}; "
            f"start {' or '.join(near)} processes (torchrun --nproc-per-node), or find a layout with "
            "tools/inspect_config.py"
        )
    _check_data_parallel(parallel)
    return world_size // size


def model_parallel_names(parallel: ParallelConfig) -> list[str]:
    """Return the settings whose product is the number of ranks that hold one model."""
    names = ["tensor_model_parallel_size", "pipeline_model_parallel_size"]
    return names + ["context_parallel_size"] * (parallel.context_parallel_size > 1)


def model_parallel_size(parallel: ParallelConfig) -> int:
    """Return the number of ranks that work on the same micro-batches."""
    return math.prod(getattr(parallel, name) for name in model_parallel_names(parallel))


def check_context_parallel(
    parallel: ParallelConfig, model: ModelConfig, transformer_impl: str, *, bf16: bool
) -> None:
    """Check that context-parallel ranks can divide sequences, and can use Transformer Engine's attention."""
    ranks = parallel.context_parallel_size
    if ranks == 1:
        return
    if transformer_impl == "local":
        raise UserError(
            f"--context-parallel-size {ranks} needs Transformer Engine's attention; remove "
            "--transformer-impl local, or shard long sequences with --tensor-model-parallel-size and "
            "--sequence-parallel"
        )
    if not bf16:
        raise UserError(
            f"--context-parallel-size {ranks} needs --bf16: Transformer Engine's context-parallel attention "
            "does not support float32"
        )
    # Each rank takes an early and a late piece of the sequence, so that all have equal work under a causal
    # mask. Tensor-parallel ranks then divide both pieces.
    sharded = parallel.sequence_parallel or SCHEMES[model.recurrence].shards_states
    unit = 2 * ranks * (parallel.tensor_model_parallel_size if sharded else 1)
    if model.seq_length % unit:
        near = [str(n) for n in (model.seq_length // unit * unit, -(-model.seq_length // unit) * unit) if n]
        raise UserError(
            f"--context-parallel-size {ranks} divides sequences into {unit} pieces on this layout, but "
            f"--seq-length {model.seq_length} is not a multiple of {unit}; use {' or '.join(near)}"
        )


def _check_data_parallel(parallel: ParallelConfig) -> None:
    if parallel.overlap_param_gather:
        for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
            if not getattr(parallel, name):
                raise UserError(
                    f"--overlap-param-gather needs {flag(name)}; add it, or remove --overlap-param-gather"
                )
    if parallel.ddp_bucket_size is not None and not parallel.overlap_grad_reduce:
        raise UserError("--ddp-bucket-size needs --overlap-grad-reduce; add it, or remove --ddp-bucket-size")


def check_tensor_parallel(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Check that tensor parallelism divides the model's dimensions."""
    size = parallel.tensor_model_parallel_size
    divided = {
        "--num-attention-heads": model.num_attention_heads,
        "--ffn-hidden-size": model.ffn_hidden_size or 0,
        "the padded vocabulary (see --make-vocab-size-divisible-by)": (
            padded_vocab_size(model) if model.vocab_size else 0
        ),
    }
    if parallel.sequence_parallel:
        if size == 1:
            raise UserError(
                "--sequence-parallel divides the sequence over tensor-parallel ranks, but there is only one; "
                "remove it, or set --tensor-model-parallel-size above 1"
            )
        divided["--seq-length (with --sequence-parallel)"] = model.seq_length
    elif SCHEMES[model.recurrence].shards_states:
        divided["--seq-length (the recurrence's memory is sharded along it)"] = model.seq_length
    for what, number in divided.items():
        if number % size:
            near = max(n for n in range(1, size) if number % n == 0)
            raise UserError(
                f"--tensor-model-parallel-size {size} does not divide {what}, {number}; change one of them, "
                f"e.g. to --tensor-model-parallel-size {near}"
            )


def check_pipeline(
    parallel: ParallelConfig, model: ModelConfig, training: TrainingConfig, data_parallel: int
) -> None:
    """Check that layers divide over the pipeline's ranks, and micro-batches over its schedule."""
    ranks = parallel.pipeline_model_parallel_size
    looped = SCHEMES[model.recurrence].has_loop
    _refuse_settings_without_effect(parallel, looped)
    if ranks == 1:
        return
    if looped:
        parts = placement(model, parallel)
        _check_parts(parts)
        _check_recomputed_groups(training, parts)
    else:
        _check_plain_layers(parallel, layout(model).depth)
    if not looped and parallel.num_virtual_stages_per_pipeline_rank in (None, 1):
        return
    unit = training.micro_batch_size * data_parallel
    smallest = batch_sizes(training)[0]
    if smallest // unit < ranks:
        name = "a START of --rampup-batch-size of" if training.rampup_batch_size else "--global-batch-size"
        raise UserError(
            f"--pipeline-model-parallel-size {ranks} needs at least {ranks} micro-batches per step and "
            f"data-parallel rank, but only {smallest // unit} fit into a batch; "
            f"use {name} {ranks * unit} or more, or a smaller --micro-batch-size"
        )
    for batch in batch_sizes(training):
        microbatch_group_size(parallel, batch // unit)


def _check_parts(parts: Placement) -> None:
    empty = [r for r in range(parts.ranks) if not any(s[r] for _, s in parts.sections())]
    if empty:
        raise UserError(
            f"pipeline rank {empty[0]} would have no layers ({parts}); use a smaller "
            "--pipeline-model-parallel-size, or --pipeline-model-parallel-layout"
        )


def _check_recomputed_groups(training: TrainingConfig, parts: Placement) -> None:
    group = training.recompute_num_layers or 1
    if training.recompute_method == "uniform" and any(n % group for _, s in parts.sections() for n in s):
        raise UserError(
            f"--recompute-num-layers {group} does not divide every rank's part of every section ({parts}), "
            "as --recompute-method uniform needs; 1 always does"
        )


def _refuse_settings_without_effect(parallel: ParallelConfig, looped: bool) -> None:
    """Refuse settings of a pipeline, or of the other kind of pipeline, that would have no effect."""
    pipeline_only = [
        "pipeline_model_parallel_layout",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
    ]
    if parallel.pipeline_model_parallel_size == 1:
        pipeline_only += ["num_virtual_stages_per_pipeline_rank", "microbatch_group_size_per_virtual_stage"]
        for name in pipeline_only:
            if getattr(parallel, name):
                raise UserError(
                    f"{flag(name)} needs --pipeline-model-parallel-size above 1; add it, or remove "
                    f"{flag(name)}"
                )
    elif looped and parallel.num_virtual_stages_per_pipeline_rank:
        raise UserError(
            "--num-virtual-stages-per-pipeline-rank is for vanilla, but the virtual stages of a looped model "
            "are its K+2 passes; remove it"
        )
    elif not looped:
        for name in pipeline_only:
            if getattr(parallel, name):
                raise UserError(f"{flag(name)} is for looped models, not for vanilla; remove it")


def _check_plain_layers(parallel: ParallelConfig, depth: int) -> None:
    ranks, virtual = (
        parallel.pipeline_model_parallel_size,
        parallel.num_virtual_stages_per_pipeline_rank or 1,
    )
    if depth % (ranks * virtual):
        below = depth // (ranks * virtual) * ranks * virtual
        near = [str(n) for n in (below, below + ranks * virtual) if n]
        raise UserError(
            f"--layers {depth} is not divisible by --pipeline-model-parallel-size {ranks} x "
            f"--num-virtual-stages-per-pipeline-rank {virtual} = {ranks * virtual} chunks; "
            f"use {' or '.join(near)} layers"
        )
