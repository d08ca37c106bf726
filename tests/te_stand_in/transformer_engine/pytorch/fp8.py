"""The context in which modules compute in FP8, and the history of delayed scaling."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

FP8_MAX = 448.0


class FP8GlobalStateManager:
    """Whether FP8 is on, and every module that keeps a history."""

    recipe: Any = None
    depth = 0
    histories: ClassVar[list["History"]] = []

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Inside ``fp8_autocast(enabled=True)``."""
        return cls.recipe is not None


class History:
    """Largest values of input and weight in the latest uses. The first row belongs to the current region.

    Transformer Engine has a third column for outputs, and a history of gradients: here they stay zero.
    """

    def __init__(self, recipe: Any):
        self.recipe = recipe
        self.amax_history, self.scale = torch.zeros(recipe.amax_history_len, 3), torch.ones(3)
        self.amax_history_bwd, self.scale_bwd = torch.zeros(recipe.amax_history_len, 2), torch.ones(2)
        self.updates = 0
        FP8GlobalStateManager.histories.append(self)

    def tensors(self) -> dict[str, Tensor]:
        """The state, with the names of Transformer Engine's extra state."""
        return {
            "scale_fwd": self.scale,
            "amax_history_fwd": self.amax_history,
            "scale_bwd": self.scale_bwd,
            "amax_history_bwd": self.amax_history_bwd,
        }

    def record(self, which: int, value: Tensor) -> Tensor:
        """Record the largest value and return the scale to use now."""
        self.amax_history[0, which] = torch.maximum(self.amax_history[0, which], value.abs().max().float())
        return self.scale[which]

    def update(self) -> None:
        """End a region: compute new scales from the history, and shift it by one row."""
        last = self.recipe.amax_compute_algo == "most_recent"
        amax = self.amax_history[0] if last else self.amax_history.amax(0)
        self.scale = torch.where(amax > 0, FP8_MAX / amax, self.scale)
        if len(self.amax_history) > 1:
            self.amax_history = self.amax_history.roll(1, 0)
        self.amax_history[0] = 0.0
        self.updates += 1


@contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: Any = None, fp8_group: Any = None) -> Iterator[None]:
    """Enable FP8 inside. The end of the outermost region updates the histories of all modules."""
    state = FP8GlobalStateManager
    before, state.recipe = state.recipe, fp8_recipe if enabled else None
    state.depth += 1
    try:
        yield
    finally:
        state.depth -= 1
        if enabled and state.depth == 0 and torch.is_grad_enabled():
            for history in state.histories:
                history.update()
        state.recipe = before


@contextmanager
def fp8_model_init(
    enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    """Primary weights in FP8 are not part of the stand-in."""
    assert not enabled, "the stand-in has no FP8 primary weights"
    yield


def to_fp8(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """``x`` rounded to float8 (e4m3) and back, scaled to its own largest value unless a scale is given."""
    if scale is None:
        largest = x.detach().abs().max().float()
        scale = torch.where(largest > 0, FP8_MAX / largest, torch.ones_like(largest))
    scaled = (x.float() * scale).clamp(-FP8_MAX, FP8_MAX)
    return (scaled.to(torch.float8_e4m3fn).float() / scale).to(x.dtype)
