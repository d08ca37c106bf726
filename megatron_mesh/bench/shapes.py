"""Shapes to measure at: the paper's models, and a slice of the largest, on one card with all variants."""

from dataclasses import dataclass
from typing import Literal

PLAIN = "plain"
"""The variant that is Megatron-core's GPT itself."""
EAGER = "eager"
"""The variant that is a loop of transformers' layers (``eager_loop.py``); others are schemes by name."""
FP8 = "-fp8"
"""Ending of a variant whose core computes in FP8."""
COMPILED = "-compiled"
"""Ending of a variant whose layers are compiled by ``torch.compile``."""

_LOOPED = ("base", "residual", "anchor", "mesh")
_IN_FP8 = (f"base{FP8}", f"mesh{FP8}")

ShapeName = Literal["160m", "410m", "1b", "1.4b", "2.8b", "6.9b-slice"]


@dataclass(frozen=True)
class Shape:
    """A model, and what of it fits one GPU of 141 GB at 2,048 tokens in bf16 when all variants live there."""

    layers: str
    hidden_size: int
    num_attention_heads: int
    micro_batch_size: int
    variants: tuple[str, ...]


SHAPES: dict[ShapeName, Shape] = {
    "160m": Shape("2+4R2+2", 768, 12, 16, (PLAIN, *_LOOPED, EAGER, *_IN_FP8)),
    "410m": Shape("4+8R2+4", 1024, 16, 8, (PLAIN, *_LOOPED, EAGER, *_IN_FP8)),
    "1b": Shape("3+5R2+3", 2048, 8, 4, (PLAIN, *_LOOPED, EAGER)),
    "1.4b": Shape("4+8R2+4", 2048, 16, 4, (PLAIN, "base", "mesh", EAGER)),
    "2.8b": Shape("6+10R2+6", 2560, 32, 2, (PLAIN, "base", "mesh")),
    # The width of 6.9B; its own 6+10R2+6 takes 400 GB for weights, gradients and optimizer.
    "6.9b-slice": Shape("1+4R2+1", 4096, 32, 4, ("base", "mesh", *_IN_FP8)),
}
