"""The phases of a run, by name: what a start spends its time on, and where the fault test aims its kills."""

from collections.abc import Callable

_listeners: list[Callable[[str], None]] = []


def enter(phase: str) -> None:
    """This process enters ``phase``, for example "data" or "planning a save"."""
    for listener in _listeners:
        listener(phase)


def listen(listener: Callable[[str], None]) -> None:
    """Call ``listener`` with the name of every phase that this process enters from now on, on its thread."""
    _listeners.append(listener)
