"""Names for stretches of the forward pass, which profiles show; they cost nothing unless somebody looks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from megatron_mesh.runtime import device

_NOTHING = nullcontext()
_marking = False


@contextmanager
def marking() -> Iterator[None]:
    """Ranges are marked inside: for torch's profiler, and by NVTX for Nsight Systems."""
    global _marking
    before, _marking = _marking, True
    try:
        yield
    finally:
        _marking = before


def named(name: str) -> AbstractContextManager[None]:
    """What runs inside has this name in a profile, if ``marking``."""
    return device.marked(name) if _marking else _NOTHING
