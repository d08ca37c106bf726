"""Recipes. The stand-in only distinguishes scaling with a history from scaling without."""

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Format(Enum):
    """Number formats of forward and backward."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Recipe:
    """Base of all recipes."""

    def delayed(self) -> bool:
        """Whether scales come from earlier values."""
        return isinstance(self, DelayedScaling)


@dataclass
class Float8CurrentScaling(Recipe):
    """Scales from the values themselves."""

    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False


@dataclass
class Float8BlockScaling(Recipe):
    """Scales from the values of a block (here: of the whole tensor)."""

    fp8_format: Format = Format.E4M3


class DelayedScaling(Recipe):
    """Scales from a history of largest values. Ignores unknown settings; Megatron-core passes some."""

    def __init__(self, amax_history_len: int = 1024, amax_compute_algo: str = "max", **ignored: Any):
        self.amax_history_len = amax_history_len
        self.amax_compute_algo = amax_compute_algo
