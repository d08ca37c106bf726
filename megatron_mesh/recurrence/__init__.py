"""The maths of recursion: schemes, routers and memory. Pure torch; knows nothing of Megatron.

Legend of shapes: S sequence, B micro-batch, H hidden, N slots, K loops. A state is ``[S, B, H]``;
nothing here mixes tokens, so a sequence shard ``[S/TP, B, H]`` serves as well.
"""

from .mesh import MeSH, VanillaMeSH
from .schemes import SCHEMES, LoopState, RecurrenceOptions, Scheme, build_scheme

__all__ = [
    "SCHEMES",
    "LoopState",
    "MeSH",
    "RecurrenceOptions",
    "Scheme",
    "VanillaMeSH",
    "build_scheme",
]
