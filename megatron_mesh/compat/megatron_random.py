"""Internals of Megatron-core's random number generators, for runs on a CPU."""

import logging
from collections.abc import Callable
from contextlib import ExitStack

from megatron.core.tensor_parallel import random
from torch import Tensor

from megatron_mesh.compat import changes


def replace_recompute_generator(
    stack: ExitStack, get_state: Callable[..., Tensor], set_state: Callable[..., None]
) -> None:
    """Let recomputation read and set the generator by these functions, until ``stack`` is closed."""
    changes.replace(stack, random, "_get_cuda_rng_state", get_state)
    changes.replace(stack, random, "_set_cuda_rng_state", set_state)


def silence_generator_warning(stack: ExitStack) -> None:
    """Drop "CPU RNG state changed within GPU RNG context": on a CPU they are the same generator."""
    logger = logging.getLogger(random.__name__)
    stack.callback(logger.setLevel, logger.level)
    logger.setLevel(logging.ERROR)
