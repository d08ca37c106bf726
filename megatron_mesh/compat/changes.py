"""Make process-wide changes to other packages so that they can be taken back."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

_made: dict[str, ExitStack] = {}


def make(name: str, change: Callable[[ExitStack], None]) -> None:
    """Call ``change(stack)``, unless the changes called ``name`` are already in effect.

    Args:
        change: registers with the stack how to take back each change that it makes.
    """
    if name in _made:
        return
    stack = ExitStack()
    change(stack)
    _made[name] = stack


def replace(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set the attribute ``name`` of a module or class until ``stack`` is closed."""
    from unittest import mock  # imports asyncio, which --help does not need

    stack.enter_context(mock.patch.object(owner, name, value))


def take_back_all() -> None:
    """Take back all changes, the latest first."""
    while _made:
        _, stack = _made.popitem()
        stack.close()
