"""Find out whether Transformer Engine can be used in this process."""

import functools
import importlib
import importlib.util

from megatron.core.utils import is_te_min_version

from megatron_mesh.compat.imports import BROKEN
from megatron_mesh.runtime import device

NO_GPU = "there is no GPU"
_OLDEST = "2.9"  # the lower bound in megatron-core 0.16.1's own extra


@functools.cache
def why_no_transformer_engine() -> str | None:
    """Return why Transformer Engine cannot be used, or None if it can be imported."""
    if not is_installed():
        return "Transformer Engine is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except BROKEN as error:  # typically CUDA's libraries are missing
        if not device.has_gpu():
            return NO_GPU
        return f"Transformer Engine is installed but cannot be imported ({error})"
    if not is_te_min_version(_OLDEST):
        return f"Transformer Engine is older than {_OLDEST}"
    return None


def is_installed() -> bool:
    """Whether the package is there, working or not."""
    return importlib.util.find_spec("transformer_engine") is not None
