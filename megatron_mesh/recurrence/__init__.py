"""The maths of recursion: schemes, routers and memory, in pure torch.

A scheme receives the output of each pass and returns the input of the next; the code that runs the passes
calls ``Scheme.enter``. Start reading in ``schemes.py``, then ``mesh.py``. Nothing here depends on Megatron,
and exported models ship these files.

Shapes: S sequence, B micro-batch, H hidden size, N slots, K loops. A state is ``[S, B, H]``. Nothing here
mixes tokens, so every function also works on a sequence shard ``[S/TP, B, H]``.
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
