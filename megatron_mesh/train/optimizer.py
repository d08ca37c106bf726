"""Builds Megatron-core's optimizer and learning-rate schedule from our settings."""

import logging

import torch
from megatron.core.optimizer import (
    MegatronOptimizer,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from megatron_mesh.config.layout import counts_samples
from megatron_mesh.config.schema import Config, OptimizerConfig
from megatron_mesh.parallel import Stage

logger = logging.getLogger(__name__)


def build_optimizer(settings: Config, stage: Stage) -> MegatronOptimizer:
    """Build AdamW. For a bfloat16 model it holds float32 main parameters."""
    config, parallel = settings.optimizer, settings.parallel
    dtype = stage.config.params_dtype
    theirs = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    # Megatron's rules exempt biases and vectors from weight decay; ours exempts recurrence coefficients.
    rules = get_standard_config_overrides(theirs)
    rules[ParamKey(attr="no_weight_decay")] = ParamGroupOverride(wd_mult=0.0)
    return get_megatron_optimizer(theirs, stage.groups, config_overrides=rules, use_gloo_process_groups=False)


def warn_if_lr_reaches_zero_early(config: Config) -> None:
    """Warn if the schedule ends before the run does, for example after --train-iters was raised."""
    optimizer, training = config.optimizer, config.training
    if counts_samples(training):
        what, unit, decay, last = "sample", "samples", optimizer.lr_decay_samples, training.train_samples
    else:
        what, unit, decay, last = "step", "iters", optimizer.lr_decay_iters, training.train_iters
    decays = optimizer.lr_decay_style != "constant" and not optimizer.min_lr
    if decays and decay is not None and last is not None and decay < last:
        logger.warning(
            "the learning rate is 0 after %s %d (--lr-decay-%s), so the model learns nothing more until "
            "%s %d; for a decay over the whole run give --lr-decay-%s %d --override-opt-param-scheduler",
            *(what, decay, unit, what, last, unit, last),
        )


def build_schedule(config: OptimizerConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Build the schedule: warm-up and decay of the learning rate, and a constant weight decay.

    It counts in steps or samples, like the length of the run. As in Megatron-LM, a warm-up starts at
    ``lr_warmup_init``, by default 0, so the first step then changes nothing.

    Args:
        config: resolved settings.
    """
    in_samples = config.lr_decay_iters is None
    warmup, decay, wsd = (
        (config.lr_warmup_samples, config.lr_decay_samples, config.lr_wsd_decay_samples)
        if in_samples
        else (config.lr_warmup_iters, config.lr_decay_iters, config.lr_wsd_decay_iters)
    )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr_warmup_init,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup or 0,
        lr_decay_steps=decay,
        lr_decay_style=config.lr_decay_style,
        wsd_decay_steps=wsd,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )
