"""The state of a run besides weights and optimizer, in one typed object so that nothing is forgotten."""

from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


@dataclass
class TrainState:
    """Where a run stands. Equal on all ranks; each has generators of its own (``runtime/random.py``)."""

    schedule: OptimizerParamScheduler
    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Sequences trained on by all ranks: the position in the data."""
    train_loss: float | None = None
    """Loss per token of the last logged step, ``train_loss_step``."""
    train_loss_step: int | None = None
    valid_loss: float | None = None
    """Loss per token of the last validation, after ``valid_loss_step``."""
    valid_loss_step: int | None = None
    fingerprints: dict[str, str] | None = None
    """Of what decides the samples: by stream (``SampleStream.order``), and of the tokenizer."""
    skipped: int = 0
    """Steps skipped in a row until now, since loss or gradients were not finite."""

    def advance(self, samples: int, *, schedule_in_samples: bool = False) -> None:
        """Count an optimizer step over ``samples`` sequences and set the next one's learning rate."""
        self.step += 1
        self.consumed_samples += samples
        self.schedule.step(samples if schedule_in_samples else 1)

    def state_dict(self) -> dict[str, Any]:
        """Everything as JSON has it."""
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
        """Take over what ``state_dict`` gave; the new schedule moves to ``schedule_position``."""
        self.step = saved["step"]
        self.consumed_samples = saved["consumed_samples"]
        self.train_loss, self.train_loss_step = saved["train_loss"], saved.get("train_loss_step")
        self.valid_loss, self.valid_loss_step = saved["valid_loss"], saved.get("valid_loss_step")
        self.skipped = saved.get("skipped", 0)
        self.fingerprints = saved.get("fingerprints")
        self.schedule.step(schedule_position)
