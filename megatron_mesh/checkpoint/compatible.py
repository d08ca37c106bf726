"""Whether a run can go on from a checkpoint."""

from dataclasses import asdict
from typing import Any

from megatron_mesh.checkpoint.directory import CONFIG_FILE, Checkpoint
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import flag
from megatron_mesh.errors import UserError

# Model settings that do not say what a checkpoint's weights mean.
_FREE = {"mesh_memory", "init_method_std", "router_init_std", "router_bias_init", "depth_scaled_init"}
# The learning rate's course and the weight decay: what --override-opt-param-scheduler overrides.
_SCHEDULE = (
    "lr",
    "min_lr",
    "weight_decay",
    "lr_decay_style",
    "lr_decay_iters",
    "lr_warmup_iters",
    "lr_warmup_init",
    "lr_wsd_decay_style",
    "lr_wsd_decay_iters",
)


def check_same_run(checkpoint: Checkpoint, config: Config) -> None:
    """Raise UserError, naming the settings that differ, if ``config`` cannot go on from ``checkpoint``."""
    settings, saved = config.checkpoint, checkpoint.config
    where = f"the checkpoint {checkpoint.path}"
    free = _FREE | {"seq_length"} if settings.finetune else _FREE
    names = [name for name in asdict(config.model) if name not in free]
    if different := _differences(saved.model, config.model, names):
        raise UserError(
            f"{where} is of another model: {different}; give the checkpoint's settings "
            f"(--config {checkpoint.path / CONFIG_FILE}) or --load another checkpoint"
        )
    if settings.finetune or not settings.load_optim:
        return
    if checkpoint.weights_only:
        raise UserError(
            f"{where} holds weights alone; add --finetune to start a run from them, or --no-load-optim "
            "--no-load-rng to go on at its step with a new optimizer"
        )
    if different := _differences(saved.training, config.training, ["bf16"]):
        raise UserError(f"{where} has an optimizer of another precision: {different}; add --no-load-optim")
    different = _differences(saved.optimizer, config.optimizer, _SCHEDULE)
    if different and not settings.override_opt_param_scheduler:
        raise UserError(
            f"{where} has another learning-rate schedule: {different}; give the checkpoint's, or "
            "--override-opt-param-scheduler to go on with this run's"
        )


def _differences(saved: Any, ours: Any, names: Any) -> str:
    return ", ".join(
        f"{flag(name)} is {getattr(saved, name)} there and {getattr(ours, name)} here"
        for name in names
        if getattr(saved, name) != getattr(ours, name)
    )
