"""The tools of ``tools/``, called in this process."""

import importlib
from collections.abc import Callable, Sequence
from functools import partial

from megatron_mesh import command


def tool(name: str) -> Callable[[Sequence[str]], int | None]:
    """``tools/NAME.py`` as a function of its command line. Errors are raised, not printed."""
    return partial(command.call, importlib.import_module(f"tools.{name}").main)
