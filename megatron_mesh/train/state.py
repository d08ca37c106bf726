"""The state of a run besides weights and optimizer, in one typed object so that nothing is forgotten."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from megatron.core import tensor_parallel
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mesh.runtime import device


@dataclass
class TrainState:
    """Where a run stands. Equal on all ranks; the generators' states (``rng_state``) are each rank's own."""

    schedule: OptimizerParamScheduler
    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Sequences trained on by all ranks: the position in the data."""
    train_loss: float | None = None
    """Loss per token of the last logged step."""
    valid_loss: float | None = None
    """Loss per token of the last validation."""

    def advance(self, samples: int) -> None:
        """Count an optimizer step over ``samples`` sequences and set the next one's learning rate."""
        self.step += 1
        self.consumed_samples += samples
        self.schedule.step(1)

    def state_dict(self) -> dict[str, Any]:
        """Everything as JSON has it."""
        return {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "train_loss": self.train_loss,
            "valid_loss": self.valid_loss,
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any], *, with_schedule: bool) -> None:
        """Take over what ``state_dict`` gave; without ``with_schedule`` the schedule starts anew."""
        self.step = saved["step"]
        self.consumed_samples = saved["consumed_samples"]
        self.train_loss = saved["train_loss"]
        self.valid_loss = saved["valid_loss"]
        if with_schedule:
            self.schedule.load_state_dict(saved["schedule"])


def rng_state() -> dict[str, Any]:
    """States of this rank's generators: Python's, NumPy's, torch's and Megatron's tracker."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": device.rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what ``rng_state`` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    device.set_rng_state(state["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
