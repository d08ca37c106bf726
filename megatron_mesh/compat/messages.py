"""Silence messages of Megatron-core that are wrong or repeated here; all its other messages stay."""

import warnings
from contextlib import ExitStack, suppress

# Megatron-core prints in every process and from five modules that Transformer Engine and apex are missing.
# We log it once (runtime/device.py: describe).
_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed. Falling back to Torch Norm",
    "The following imports from `dynamic_context.py` will be removed",
)


def silence(stack: ExitStack) -> None:
    """Ignore the warnings that Megatron-core prints when it is imported, until ``stack`` is closed."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
        stack.callback(_remove, warnings.filters[0])


def _remove(entry: object) -> None:
    with suppress(ValueError):  # already gone: the program has reset its filters
        warnings.filters.remove(entry)  # type: ignore[attr-defined]
