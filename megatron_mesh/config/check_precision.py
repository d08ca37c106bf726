"""Resolving the precision settings, and refusing FP8 settings that don't fit each other, the model or the
rank layout.

Whether Transformer Engine is installed is checked when the model is built (``model/implementation.py``),
because plans for other machines don't need it.
"""

from dataclasses import replace

from megatron_mesh.config.derived import layout
from megatron_mesh.config.ranges import at_least
from megatron_mesh.config.schema import ModelConfig, ParallelConfig, PrecisionConfig, TrainingConfig
from megatron_mesh.config.settings import flag
from megatron_mesh.errors import UserError
from megatron_mesh.recurrence import SCHEMES

_UNIT = 16  # FP8 matrix products need sizes that are multiples of it
_BLOCK = 128  # block size of blockwise scaling; tensor-parallel ranks gather whole blocks
_HISTORY = 1024  # Transformer Engine's default
_BF16_COUNTS = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
_DELAYED = ("fp8_amax_history_len", "fp8_amax_compute_algo")


def resolve_precision(
    precision: PrecisionConfig, model: ModelConfig, training: TrainingConfig, parallel: ParallelConfig
) -> PrecisionConfig:
    """Resolve the precision settings; see ``checks.resolve``. ``model`` and ``training`` are resolved."""
    at_least(1, precision, "fp8_amax_history_len")
    at_least(0, precision, *_BF16_COUNTS)
    _refuse_settings_without_effect(precision)
    if precision.fp8_format is None:
        return precision
    if precision.transformer_impl == "local":
        raise UserError("--fp8-format needs Transformer Engine's layers; use --transformer-impl auto")
    if not training.bf16:
        raise UserError("--fp8-format needs --bf16, which applies to everything that is not in FP8; add it")
    if precision.fp8_param_gather and not parallel.use_distributed_optimizer:
        raise UserError(
            "--fp8-param-gather needs --use-distributed-optimizer, which has the float32 weights; add it"
        )
    _check_sizes(precision, model, training, parallel)
    if precision.first_last_layers_bf16:
        precision = _resolve_bf16_layers(precision, model, parallel)
    if precision.fp8_recipe == "delayed":
        precision = _resolve_delayed(precision, model, training)
    return precision


def _refuse_settings_without_effect(precision: PrecisionConfig) -> None:
    """Refuse settings that would have no effect."""
    default = PrecisionConfig()

    def refuse(needed: str, *names: str) -> None:
        for name in names:
            if getattr(precision, name) != getattr(default, name):
                raise UserError(f"{flag(name)} needs {needed}; add it, or remove {flag(name)}")

    if precision.fp8_format is None:
        refuse(
            "--fp8-format", "fp8_recipe", "fp8_scope", "fp8_param_gather", "first_last_layers_bf16", *_DELAYED
        )
    if not precision.first_last_layers_bf16:
        refuse("--first-last-layers-bf16", *_BF16_COUNTS)
    if precision.fp8_recipe != "delayed":
        refuse("--fp8-recipe delayed", *_DELAYED)


def _check_sizes(
    precision: PrecisionConfig, model: ModelConfig, training: TrainingConfig, parallel: ParallelConfig
) -> None:
    ranks = parallel.tensor_model_parallel_size
    shared = f" / --tensor-model-parallel-size {ranks}" if ranks > 1 else ""
    divided = f" / --context-parallel-size {parallel.context_parallel_size}"
    batch = f"--micro-batch-size x --seq-length{divided if parallel.context_parallel_size > 1 else ''}"
    tokens = model.seq_length // parallel.context_parallel_size * training.micro_batch_size
    needed = [
        ("--hidden-size", model.hidden_size, _UNIT),
        (f"--hidden-size{shared}", model.hidden_size // ranks, _UNIT),
        (f"--ffn-hidden-size{shared}", (model.ffn_hidden_size or 0) // ranks, _UNIT),
        (batch, tokens, _UNIT),
    ]
    if parallel.sequence_parallel:
        # Transformer Engine asserts it (utils.assert_dim_for_all_gather).
        unit = _BLOCK if precision.fp8_recipe == "blockwise" else _UNIT
        needed += [("--hidden-size", model.hidden_size, unit), (f"{batch}{shared}", tokens // ranks, unit)]
    for what, size, unit in needed:
        if size % unit:
            kind = "blockwise FP8 with --sequence-parallel" if unit == _BLOCK else "FP8"
            raise UserError(
                f"{what} is {size}, but {kind} needs a multiple of {unit}, e.g. "
                f"{' or '.join(str(n) for n in (size // unit * unit, -(-size // unit) * unit) if n)}"
            )


def _resolve_bf16_layers(
    precision: PrecisionConfig, model: ModelConfig, parallel: ParallelConfig
) -> PrecisionConfig:
    if precision.fp8_recipe == "delayed":
        raise UserError(
            "--fp8-recipe delayed updates its scales once for all layers of a pass, but "
            "--first-last-layers-bf16 divides these layers; remove it, or use --fp8-recipe tensorwise"
        )
    start, end = (1 if getattr(precision, n) is None else getattr(precision, n) for n in _BF16_COUNTS)
    layers, ranks = layout(model), parallel.pipeline_model_parallel_size
    if SCHEMES[model.recurrence].has_loop:
        if precision.fp8_scope == "core":
            raise UserError(
                "--first-last-layers-bf16 has no effect with --fp8-scope core, which already leaves prelude "
                "and coda in bfloat16; remove it, or use --fp8-scope all"
            )
        if precision.fp8_param_gather and ranks > 1:
            raise UserError(
                "--fp8-param-gather with --first-last-layers-bf16 is not implemented for a looped model on a "
                "pipeline; remove one of them, or use --fp8-scope core"
            )
        limits = {"prelude": (start, layers.prelude), "coda": (end, layers.coda)}
    else:
        limits = {"pipeline rank": (max(start, end), layers.depth // ranks)}
    for (where, (count, most)), name in zip(limits.items(), _BF16_COUNTS, strict=False):
        if count > most:
            raise UserError(
                f"{flag(name)} {count} is too large; a {where} of --layers {layers} has {most} layers"
            )
    return replace(precision, num_layers_at_start_in_bf16=start, num_layers_at_end_in_bf16=end)


def _resolve_delayed(
    precision: PrecisionConfig, model: ModelConfig, training: TrainingConfig
) -> PrecisionConfig:
    if SCHEMES[model.recurrence].has_loop:
        if precision.fp8_amax_compute_algo == "most_recent":
            raise UserError(
                "--fp8-amax-compute-algo most_recent would scale each pass of the core by the previous pass, "
                "which has other values; use max, or --fp8-recipe tensorwise"
            )
        recomputed = training.recompute_modules or []
        if training.recompute_granularity == "full" or "mlp" in recomputed:
            raise UserError(
                "--fp8-recipe delayed cannot recompute layers of a loop: Transformer Engine restores the "
                "scales of the forward passes in the order in which they ran, but the backward runs them in "
                "reverse; use --fp8-recipe tensorwise, or recompute only core_attn"
            )
    return replace(
        precision,
        fp8_amax_history_len=precision.fp8_amax_history_len or _HISTORY,
        fp8_amax_compute_algo=precision.fp8_amax_compute_algo or "max",
    )
