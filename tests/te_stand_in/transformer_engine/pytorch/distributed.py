"""Recomputation."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch.utils.checkpoint


class CudaRNGStatesTracker:
    """Named by Megatron-core, never used."""


def activation_recompute_forward(**phases: bool) -> Any:
    """Informs modules with a history about the phase; those of the stand-in ignore it."""
    return nullcontext()


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run ``function``, and run it again in the backward pass within the same FP8 context."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast

    recipe = FP8GlobalStateManager.recipe

    def within(*inputs: Any) -> Any:
        with fp8_autocast(recipe is not None, recipe):
            return function(*inputs)

    return torch.utils.checkpoint.checkpoint(within, *args, use_reentrant=True)
