"""The state of a run besides weights and optimizer, in one object, so that saving forgets nothing."""

from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


@dataclass
class TrainState:
    """The progress of a run, equal on all ranks. Random number generators are in ``runtime/random.py``."""

    schedule: OptimizerParamScheduler
    step: int = 0
    """Number of steps done, including skipped ones."""
    consumed_samples: int = 0
    """Number of sequences that all ranks have read: the position in the data."""
    train_loss: float | None = None
    """Loss per token at step ``train_loss_step``, the last logged one."""
    train_loss_step: int | None = None
    valid_loss: float | None = None
    """Loss per token of the last validation, at step ``valid_loss_step``."""
    valid_loss_step: int | None = None
    fingerprints: dict[str, str] | None = None
    """Digests of each stream's data and order (``SampleStream.order``), and of the tokenizer."""
    skipped: int = 0
    """Number of steps in a row, up to now, that were skipped because loss or gradients were not finite."""

    def advance(self, samples: int, *, schedule_in_samples: bool = False) -> None:
        """Count a step over ``samples`` sequences, and set the learning rate of the next step."""
        self.step += 1
        self.consumed_samples += samples
        self.schedule.step(samples if schedule_in_samples else 1)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "train_loss": self.train_loss,
            "train_loss_step": self.train_loss_step,
            "valid_loss": self.valid_loss,
            "valid_loss_step": self.valid_loss_step,
            "fingerprints": self.fingerprints,
            "skipped": self.skipped,
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any], schedule_position: int) -> None:
        """Restore the result of ``state_dict``, and move the new schedule to ``schedule_position``."""
        self.step = saved["step"]
        self.consumed_samples = saved["consumed_samples"]
        self.train_loss, self.train_loss_step = saved["train_loss"], saved.get("train_loss_step")
        self.valid_loss, self.valid_loss_step = saved["valid_loss"], saved.get("valid_loss_step")
        self.skipped = saved.get("skipped", 0)
        self.fingerprints = saved.get("fingerprints")
        self.schedule.step(schedule_position)
