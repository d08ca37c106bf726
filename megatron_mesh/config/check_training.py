"""Resolving batch, length, recompute and the learning-rate schedule."""

from dataclasses import replace

from megatron_mesh.config.derived import layout
from megatron_mesh.config.ranges import at_least, positive, share
from megatron_mesh.config.schema import ModelConfig, OptimizerConfig, TrainingConfig
from megatron_mesh.config.settings import flag
from megatron_mesh.errors import UserError
from megatron_mesh.recurrence import SCHEMES


def resolve_training(training: TrainingConfig, model: ModelConfig, data_parallel: int) -> TrainingConfig:
    """See ``checks.resolve``; ``model`` is resolved."""
    at_least(1, training, "micro_batch_size", "global_batch_size", "train_iters", "train_samples")
    at_least(1, training, "max_skipped_steps")
    at_least(0, training, "seed", "eval_interval", "eval_iters")
    if training.seed >= 2**32:
        raise UserError(f"--seed {training.seed} is out of range; it must be below 2^32")
    batch = _global_batch_size(training, data_parallel)
    resolved = replace(
        training,
        global_batch_size=batch,
        train_iters=_train_iters(training, batch),
        train_samples=None,
        eval_interval=training.eval_interval if training.eval_iters else 0,
    )
    return _resolve_recompute(resolved, model)


def _global_batch_size(training: TrainingConfig, data_parallel: int) -> int:
    unit = training.micro_batch_size * data_parallel
    batch = unit if training.global_batch_size is None else training.global_batch_size
    if batch % unit:
        below = batch // unit * unit
        near = [str(n) for n in (below, below + unit) if n]
        raise UserError(
            f"--global-batch-size {batch} is not divisible by --micro-batch-size "
            f"{training.micro_batch_size} x data-parallel size {data_parallel} = {unit}; "
            f"the nearest that is: {' or '.join(near)}"
        )
    return batch


def _train_iters(training: TrainingConfig, batch: int) -> int:
    if training.train_iters is not None and training.train_samples is not None:
        raise UserError("--train-iters and --train-samples both set the length of the run; keep one")
    if training.train_iters is not None:
        return training.train_iters
    if training.train_samples is None:
        raise UserError("the length of the run is missing; give --train-iters or --train-samples")
    if training.train_samples < batch:
        raise UserError(
            f"--train-samples {training.train_samples} is less than one global batch of {batch}; "
            "raise it, or lower --global-batch-size"
        )
    return training.train_samples // batch


def _resolve_recompute(training: TrainingConfig, model: ModelConfig) -> TrainingConfig:
    """The settings of the granularity in use get their defaults, the others must be unset."""
    at_least(1, training, "recompute_num_layers")
    granularity = training.recompute_granularity
    idle = {
        None: ("recompute_method", "recompute_num_layers", "recompute_modules"),
        "selective": ("recompute_method", "recompute_num_layers"),
        "full": ("recompute_modules",),
    }
    for name in idle[granularity]:
        if getattr(training, name) is not None:
            needed = "selective" if name == "recompute_modules" else "full"
            raise UserError(f"{flag(name)} needs --recompute-granularity {needed}; add that or leave it out")
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
                f"--recompute-num-layers {group} must divide every section of --layers {layers} "
                "(--recompute-method uniform recomputes groups of so many layers); 1 always does"
            )
        return replace(training, recompute_method=method, recompute_num_layers=group)
    return training


def resolve_optimizer(optimizer: OptimizerConfig, train_iters: int) -> OptimizerConfig:
    """See ``checks.resolve``."""
    positive(optimizer, "lr", "adam_eps")
    at_least(0, optimizer, "min_lr", "lr_warmup_init", "lr_warmup_iters", "weight_decay", "clip_grad")
    at_least(1, optimizer, "lr_decay_iters", "lr_wsd_decay_iters")
    share(optimizer, "lr_warmup_fraction")
    share(optimizer, "adam_beta1", "adam_beta2", below_one=True)
    for name in ("min_lr", "lr_warmup_init"):
        if getattr(optimizer, name) > optimizer.lr:
            raise UserError(
                f"{flag(name)} {getattr(optimizer, name):g} is above the peak, --lr {optimizer.lr:g}; "
                "lower it or raise --lr"
            )
    decay = optimizer.lr_decay_iters or train_iters
    warmup = _warmup_iters(optimizer, decay)
    _check_wsd(optimizer, decay, warmup)
    return replace(optimizer, lr_decay_iters=decay, lr_warmup_iters=warmup, lr_warmup_fraction=None)


def _warmup_iters(optimizer: OptimizerConfig, decay: int) -> int:
    fraction, iters = optimizer.lr_warmup_fraction, optimizer.lr_warmup_iters
    if fraction is not None and iters is not None:
        raise UserError("--lr-warmup-fraction and --lr-warmup-iters are both given; keep one")
    warmup = int(fraction * decay) if fraction is not None else iters or 0
    if warmup >= decay:
        raise UserError(
            f"the warm-up takes {warmup} steps and the schedule (--lr-decay-iters, or else --train-iters) "
            f"has {decay}; the warm-up must be shorter"
        )
    return warmup


def _check_wsd(optimizer: OptimizerConfig, decay: int, warmup: int) -> None:
    final = optimizer.lr_wsd_decay_iters
    if optimizer.lr_decay_style != "WSD":
        if final is not None:
            raise UserError("--lr-wsd-decay-iters needs --lr-decay-style WSD; add that or leave it out")
        return
    if final is None:
        raise UserError("--lr-decay-style WSD needs --lr-wsd-decay-iters, the steps of its final decay")
    if warmup + final > decay:
        raise UserError(
            f"warm-up ({warmup} steps) and the final decay of WSD ({final}) take longer than the schedule "
            f"({decay} steps); lower --lr-wsd-decay-iters or the warm-up"
        )
