"""What happens to each setting that differs from the checkpoint's when a run resumes."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from megatron_mesh.config.layout import parse_layers
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import SETTINGS, flatten
from megatron_mesh.recurrence import SCHEMES


class Kind(Enum):
    """How a resumed run treats a setting that differs."""

    WEIGHTS = "refused, because the checkpoint has the weights of another model"
    OPTIMIZER = "refused, unless the optimizer starts anew (--no-load-optim)"
    SCHEDULE = "refused, unless this run's schedule replaces it (--override-opt-param-scheduler)"
    ORDER = "applied, and reported if the order of the samples changes (--require-same-data refuses that)"
    TOKENIZER = "applied, and reported if its content differs (--require-same-data refuses that)"
    VALIDATION = "applied, and reported if the data differ"
    REPORTED = "applied, and reported with its consequence"
    FREE = "applied; affects results only by rounding"


@dataclass(frozen=True)
class Rule:
    """How to treat a difference, and for ``REPORTED`` its consequence as shown in the log."""

    kind: Kind
    consequence: str = ""


_NO_EFFECT = "the weights come from the checkpoint, so it has no effect"
_LOSS = "losses are not comparable with those before this step"
_BATCH = "from this step on, steps and validations cover a different number of samples"
ADAM = ("adam_beta1", "adam_beta2", "adam_eps")
"""Reported only if Adam's moments are loaded."""
_ADAM = "the new value applies from this step; Adam's moments were accumulated with the old one"
_FP8 = "from this step on, the layers compute in a different precision"
_REPORTED = {
    **dict.fromkeys(
        ("init_method_std", "depth_scaled_init", "router_init_std", "router_bias_init"), _NO_EFFECT
    ),
    **dict.fromkeys(("global_batch_size", "rampup_batch_size"), _BATCH),
    **dict.fromkeys(ADAM, _ADAM),
    "clip_grad": "the new value applies from this step",
    **dict.fromkeys(
        (
            "fp8_format",
            "fp8_recipe",
            "fp8_scope",
            "fp8_param_gather",
            "first_last_layers_bf16",
            "num_layers_at_start_in_bf16",
            "num_layers_at_end_in_bf16",
            "fp8_amax_history_len",
            "fp8_amax_compute_algo",
        ),
        _FP8,
    ),
    "eval_iters": "validation covers a different number of batches, so " + _LOSS,
    **dict.fromkeys(("eod_mask_loss", "eod_mask_loss_of"), "the loss counts different tokens, so " + _LOSS),
}
_SCHEDULE = (
    "lr",
    "min_lr",
    "weight_decay",
    "lr_decay_style",
    "lr_decay_iters",
    "lr_decay_samples",
    "lr_warmup_iters",
    "lr_warmup_samples",
    "lr_warmup_init",
    "lr_wsd_decay_style",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_samples",
)
_WEIGHTS = (
    "recurrence",
    "layers",
    "prelude_layers",
    "core_layers",
    "num_loops",
    "coda_layers",
    "mesh_slots",
    "mesh_transition_query",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "seq_length",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "untie_embeddings_and_output_weights",
    "rotary_percent",
    "rotary_base",
    "norm_epsilon",
    "scale_embeddings",
)
_FREE = (
    "mesh_memory",
    "micro_batch_size",
    "train_iters",
    "train_samples",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "max_skipped_steps",
    "deterministic_mode",
    "eval_interval",
    "transformer_impl",
    "attention_backend",
    "gradient_accumulation_fusion",
    "lr_warmup_fraction",  # resolved to steps or samples
    "data_cache_path",
    "num_workers",
    # Where checkpoints and logs go, how ranks divide the work, and how long they wait.
    "save",
    "load",
    "save_interval",
    "finetune",
    "load_optim",
    "load_rng",
    "override_opt_param_scheduler",
    "require_same_data",
    "load_fallback",
    "async_save",
    "save_timeout_minutes",
    "keep_last",
    "keep_every",
    "exit_interval",
    "exit_duration_in_mins",
    "exit_grace_seconds",
    "tensor_model_parallel_size",
    "sequence_parallel",
    "context_parallel_size",
    "pipeline_model_parallel_size",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "num_virtual_stages_per_pipeline_rank",
    "microbatch_group_size_per_virtual_stage",
    "overlap_p2p_communication",
    "use_distributed_optimizer",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "ddp_bucket_size",
    "distributed_timeout_minutes",
    "watchdog_timeout_minutes",
    "log_interval",
    "output_dir",
    "tensorboard_dir",
    "wandb_project",
    "wandb_exp_name",
    "log_routers",
    "progress",
)
RESUMING: dict[str, Rule] = {
    **dict.fromkeys(_WEIGHTS, Rule(Kind.WEIGHTS)),
    "bf16": Rule(Kind.OPTIMIZER),
    **dict.fromkeys(_SCHEDULE, Rule(Kind.SCHEDULE)),
    **dict.fromkeys(("data_path", "train_data_path", "split", "seed"), Rule(Kind.ORDER)),
    **dict.fromkeys(("tokenizer_model", "tokenizer_type"), Rule(Kind.TOKENIZER)),
    **dict.fromkeys(("valid_data_path", "test_data_path"), Rule(Kind.VALIDATION)),
    **{name: Rule(Kind.REPORTED, consequence) for name, consequence in _REPORTED.items()},
    **dict.fromkeys(_FREE, Rule(Kind.FREE)),
}
"""The rule for every setting. A test compares its keys with the schema."""


def differing(saved: Config, ours: Config, kind: Kind) -> list[str]:
    """Return the names of the settings of one kind that differ, in the order of the schema."""
    before, now = _comparable(saved), _comparable(ours)
    return [name for name in SETTINGS if RESUMING[name].kind is kind and before[name] != now[name]]


def _comparable(config: Config) -> dict[str, Any]:
    """Return the settings with one spelling for values that mean the same."""
    settings = flatten(config)
    # Earlier versions always excluded the next token, without a setting for it.
    settings["eod_mask_loss_of"] = settings["eod_mask_loss_of"] or "next"
    # Depth alone makes a plain model, and earlier versions wrote 4+8+8+4 where this one writes 24.
    scheme = SCHEMES.get(config.model.recurrence)
    if config.model.layers and scheme and not scheme.has_loop:
        settings["layers"] = str(parse_layers(config.model.layers).depth)
    return settings
