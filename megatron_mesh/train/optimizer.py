"""Gradients, optimizer and learning-rate schedule: Megatron-core's, from our settings."""

import logging

import torch
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mesh.config.schema import Config, OptimizerConfig
from megatron_mesh.parallel import Stage

logger = logging.getLogger(__name__)


def build_optimizer(settings: Config, stage: Stage) -> MegatronOptimizer:
    """AdamW; for a bfloat16 model it holds main parameters in float32. Clips to ``clip_grad`` in its step."""
    config, parallel = settings.optimizer, settings.parallel
    dtype = stage.config.params_dtype
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
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
        ),
        stage.groups,
        use_gloo_process_groups=False,
    )


def warn_if_lr_reaches_zero_early(config: Config) -> None:
    """Warn if the schedule ends before the run does, as in a longer run with a shorter one's settings."""
    optimizer, last = config.optimizer, config.training.train_iters
    decays = optimizer.lr_decay_style != "constant" and not optimizer.min_lr
    if decays and last and optimizer.lr_decay_iters and optimizer.lr_decay_iters < last:
        logger.warning(
            "the learning rate is 0 after step %d (--lr-decay-iters), and nothing is learned from there to "
            "step %d; --lr-decay-iters %d --override-opt-param-scheduler makes it decay over the whole run",
            optimizer.lr_decay_iters,
            last,
            last,
        )


def build_schedule(
    config: OptimizerConfig, optimizer: MegatronOptimizer, *, override: bool = False
) -> OptimizerParamScheduler:
    """Warm-up and decay of the learning rate, counted in optimizer steps; the weight decay is constant.

    As in Megatron-LM the first step has ``lr_warmup_init``, by default 0, where there is a warm-up.

    Args:
        config: resolved.
        override: keep these settings when a checkpoint's state is loaded (else they must be equal).
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr_warmup_init,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters or 0,
        lr_decay_steps=config.lr_decay_iters,
        lr_decay_style=config.lr_decay_style,
        wsd_decay_steps=config.lr_wsd_decay_iters,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=config.lr_decay_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=override,
    )
