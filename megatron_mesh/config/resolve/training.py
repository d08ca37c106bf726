"""Resolving batch size, length, recomputation and the learning-rate schedule.

Resolving the precision settings, and refusing FP8 settings that don't fit each other, the model or the
rank layout.

Whether Transformer Engine is installed is checked when the model is built (``model/implementation.py``),
because plans for other machines don't need it.
"""

from dataclasses import replace

from megatron_mesh.config.layout import batch_sizes, counts_samples, layout
from megatron_mesh.config.schema import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainingConfig,
)
from megatron_mesh.config.settings import at_least, flag, fraction, positive
from megatron_mesh.errors import UserError
from megatron_mesh.recurrence import SCHEMES


def resolve_training(training: TrainingConfig, model: ModelConfig, data_parallel: int) -> TrainingConfig:
    """Resolve the training settings; see ``checks.resolve``. ``model`` is resolved."""
    at_least(1, training, "micro_batch_size", "global_batch_size", "train_iters", "train_samples")
    at_least(1, training, "max_skipped_steps")
    at_least(0, training, "seed", "eval_interval", "eval_iters")
    if training.seed >= 2**32:
        raise UserError(f"--seed {training.seed} is out of range; it must be below 2^32")
    resolved = replace(
        training,
        global_batch_size=training.global_batch_size or training.micro_batch_size * data_parallel,
        eval_interval=training.eval_interval if training.eval_iters else 0,
    )
    _check_rampup(resolved)
    _check_batches(resolved, data_parallel)
    _check_length(resolved)
    return _resolve_recompute(resolved, model)


def _check_rampup(training: TrainingConfig) -> None:
    """Check that a ramp-up goes from its first batch size to ``global_batch_size`` in equal steps."""
    words, batch = training.rampup_batch_size, training.global_batch_size
    if words is None:
        return
    given = f"--rampup-batch-size {' '.join(map(str, words))}"
    if len(words) != 3 or min(words) < 1:
        raise UserError(f"{given} must be three numbers above 0, START INCREMENT SAMPLES, e.g. 32 32 1000000")
    if training.train_samples is None:
        raise UserError(
            f"{given} needs --train-samples instead of --train-iters; give the run's length in samples"
        )
    start, increment, _ = words
    assert batch is not None
    if start >= batch or (batch - start) % increment:
        raise UserError(
            f"{given} does not lead from START to --global-batch-size {batch} in steps of INCREMENT: "
            f"{batch} - {start} = {batch - start} is not a positive multiple of {increment}; change one"
        )


def _check_batches(training: TrainingConfig, data_parallel: int) -> None:
    unit = training.micro_batch_size * data_parallel
    for batch in batch_sizes(training):
        if not batch % unit:
            continue
        ramp = f"--rampup-batch-size has a batch of {batch}, which"
        subject = ramp if training.rampup_batch_size else f"--global-batch-size {batch}"
        near = [str(n) for n in (batch // unit * unit, batch // unit * unit + unit) if n]
        raise UserError(
            f"{subject} is not divisible by --micro-batch-size "
            f"{training.micro_batch_size} x data-parallel size {data_parallel} = {unit}; "
            f"use {' or '.join(near)}, the nearest that is"
        )


def _check_length(training: TrainingConfig) -> None:
    if training.train_iters is not None and training.train_samples is not None:
        raise UserError("--train-iters and --train-samples are both given; keep one")
    if training.train_iters is None and training.train_samples is None:
        raise UserError("the length of the run is missing; give --train-iters or --train-samples")
    first = batch_sizes(training)[0]
    if training.train_samples is not None and training.train_samples < first:
        raise UserError(
            f"--train-samples {training.train_samples} is less than one global batch of {first}; raise it, "
            "or lower --global-batch-size"
        )


def _resolve_recompute(training: TrainingConfig, model: ModelConfig) -> TrainingConfig:
    """Fill in the settings of the granularity in use, and refuse those of the other one."""
    at_least(1, training, "recompute_num_layers")
    granularity = training.recompute_granularity
    unused = {
        None: ("recompute_method", "recompute_num_layers", "recompute_modules"),
        "selective": ("recompute_method", "recompute_num_layers"),
        "full": ("recompute_modules",),
    }
    for name in unused[granularity]:
        if getattr(training, name) is not None:
            needed = "selective" if name == "recompute_modules" else "full"
            raise UserError(
                f"{flag(name)} needs --recompute-granularity {needed}; add it, or remove {flag(name)}"
            )
    if granularity == "selective":
        return replace(training, recompute_modules=training.recompute_modules or ["core_attn"])
    if granularity == "full":
        group = training.recompute_num_layers or 1
        method = training.recompute_method or "uniform"
        layers = layout(model)
        looped = SCHEMES[model.recurrence].has_loop
        sections = (layers.prelude, layers.core, layers.coda) if looped else (layers.depth,)
        if method == "uniform" and any(n % group for n in sections):
            raise UserError(
                f"--recompute-num-layers {group} does not divide every section of --layers {layers}, as "
                "--recompute-method uniform needs; 1 always does"
            )
        return replace(training, recompute_method=method, recompute_num_layers=group)
    return training


def resolve_optimizer(optimizer: OptimizerConfig, training: TrainingConfig) -> OptimizerConfig:
    """Resolve the optimizer settings; see ``checks.resolve``. ``training`` is resolved.

    The schedule then has the unit of the run's length, steps or samples.
    """
    positive(optimizer, "lr", "adam_eps")
    at_least(0, optimizer, "min_lr", "lr_warmup_init", "weight_decay", "clip_grad")
    at_least(0, optimizer, "lr_warmup_iters", "lr_warmup_samples")
    at_least(1, optimizer, *(f"{name}_{unit}" for name in _DECAYS for unit in _UNITS))
    fraction(optimizer, "lr_warmup_fraction")
    fraction(optimizer, "adam_beta1", "adam_beta2", below_one=True)
    for name in ("min_lr", "lr_warmup_init"):
        if getattr(optimizer, name) > optimizer.lr:
            raise UserError(
                f"{flag(name)} {getattr(optimizer, name):g} is above the peak, --lr {optimizer.lr:g}; lower "
                "it, or raise --lr"
            )
    length = training.train_samples if counts_samples(training) else training.train_iters
    assert length is not None
    unit, other = ("samples", "iters") if counts_samples(training) else ("iters", "samples")
    _refuse_other_unit(optimizer, unit, other)
    decay = getattr(optimizer, f"lr_decay_{unit}") or length
    warmup = _warmup(optimizer, unit, decay)
    _check_wsd(optimizer, unit, decay, warmup)
    filled = {f"lr_decay_{unit}": decay, f"lr_warmup_{unit}": warmup}
    return replace(optimizer, **filled, lr_warmup_fraction=None)  # type: ignore[arg-type]


_UNITS, _DECAYS = ("iters", "samples"), ("lr_decay", "lr_wsd_decay")
_WORDS = {"iters": "steps", "samples": "samples"}


def _refuse_other_unit(optimizer: OptimizerConfig, unit: str, other: str) -> None:
    for name in ("lr_warmup", *_DECAYS):
        if getattr(optimizer, f"{name}_{other}") is not None:
            raise UserError(
                f"{flag(f'{name}_{other}')} counts {_WORDS[other]}, but a run of --train-{unit} counts "
                f"{_WORDS[unit]}; use {flag(f'{name}_{unit}')}"
            )


def _warmup(optimizer: OptimizerConfig, unit: str, decay: int) -> int:
    fraction, given = optimizer.lr_warmup_fraction, getattr(optimizer, f"lr_warmup_{unit}")
    if fraction is not None and given is not None:
        raise UserError(f"--lr-warmup-fraction and --lr-warmup-{unit} are both given; keep one")
    warmup = int(fraction * decay) if fraction is not None else given or 0
    if warmup >= decay:
        raise UserError(
            f"the warm-up takes {warmup} {_WORDS[unit]}, but the whole schedule (--lr-decay-{unit}, or else "
            f"--train-{unit}) has {decay}; shorten the warm-up"
        )
    return warmup


def _check_wsd(optimizer: OptimizerConfig, unit: str, decay: int, warmup: int) -> None:
    final = getattr(optimizer, f"lr_wsd_decay_{unit}")
    name = f"--lr-wsd-decay-{unit}"
    if optimizer.lr_decay_style != "WSD":
        if final is not None:
            raise UserError(f"{name} needs --lr-decay-style WSD; add it, or remove {name}")
        return
    if final is None:
        raise UserError(f"--lr-decay-style WSD needs {name}, the {_WORDS[unit]} of its final decay; add it")
    if warmup + final > decay:
        raise UserError(
            f"warm-up ({warmup} {_WORDS[unit]}) and the final decay of WSD ({final}) take longer than the "
            f"whole schedule ({decay}); lower {name} or the warm-up"
        )


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
