"""Announce the phases of a run by name, for the breakdown of the start and for the fault test."""

from collections.abc import Callable

_listeners: list[Callable[[str], None]] = []


def enter(phase: str) -> None:
    """Announce that this process enters ``phase``, for example "data" or "planning a save"."""
    for listener in _listeners:
        listener(phase)


def listen(listener: Callable[[str], None]) -> None:
    """Call ``listener`` with the name of every later phase, in the thread that enters it."""
    _listeners.append(listener)
