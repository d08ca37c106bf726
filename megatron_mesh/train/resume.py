"""Which checkpoint a run starts from, and whether it may."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mesh.config.schema import CheckpointConfig, Config
from megatron_mesh.config.settings import flag, with_values
from megatron_mesh.config.sources import read_yaml
from megatron_mesh.errors import UserError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CONFIG_FILE = "config.yaml"
STATE_FILE = "state.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"

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


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, without its tensors."""

    path: Path
    config: Config
    world_size: int
    train_state: dict[str, Any]
    """See ``TrainState.state_dict``."""

    def same_layout(self, config: Config, world_size: int) -> bool:
        """Whether each rank of a run of ``config`` stands where the same rank of the saved one stood."""
        saved, ours = self.config.parallel, config.parallel
        return (self.world_size, saved.tensor_model_parallel_size, saved.pipeline_model_parallel_size) == (
            world_size,
            ours.tensor_model_parallel_size,
            ours.pipeline_model_parallel_size,
        )

    def position(self, config: Config) -> tuple[int, int]:
        """Step and consumed samples at which a run of ``config`` starts."""
        if config.checkpoint.finetune:
            return 0, 0
        step, samples = self.train_state["step"], self.train_state["consumed_samples"]
        if step >= (config.training.train_iters or 0):
            logger.info("%s is at step %d: raise --train-iters to train on", self.path, step)
        return step, samples


def find_checkpoint(settings: CheckpointConfig) -> Checkpoint | None:
    """The checkpoint to start from: the latest one in ``load``, or ``load`` itself; None for a new run.

    Raises:
        UserError: ``load`` holds no checkpoint and is not ``save``; or going on would write among the
            checkpoints of another run in ``save``.
    """
    save = Path(settings.save).resolve() if settings.save else None
    load = Path(settings.load).resolve() if settings.load else None
    if save and _holds_checkpoints(save) and (load != save or settings.finetune):
        raise UserError(
            f"--save {settings.save} already holds checkpoints, of a run that this one does not go on with; "
            f"choose another directory, or go on with that run by --load {settings.save}"
        )
    if load is None:
        return None
    if (load / STATE_FILE).is_file():
        return read_checkpoint(load)
    tracker = load / TRACKER_FILE
    if tracker.is_file():
        return read_checkpoint(load / f"iter_{tracker.read_text(encoding='utf-8').strip():0>7}")
    if load == save and not settings.finetune:
        return None
    raise UserError(f"--load {settings.load}: no checkpoint there (no {TRACKER_FILE}); check the directory")


def _holds_checkpoints(directory: Path) -> bool:
    return (directory / TRACKER_FILE).exists() or any(directory.glob("iter_*"))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what a checkpoint says of itself.

    Raises:
        UserError: it is incomplete or of a newer format.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a complete checkpoint ({error}); --load another one") from None
    if state["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{path} has checkpoint format {state['format_version']}, and this version reads formats up to "
            f"{FORMAT_VERSION}; use a newer megatron_mesh"
        )
    config = with_values(Config(), read_yaml(path / CONFIG_FILE))
    return Checkpoint(path, config, state["world_size"], state["train_state"])


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
