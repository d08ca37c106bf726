"""Range checks of single settings."""

import math
from typing import Any

from megatron_mesh.config.settings import flag
from megatron_mesh.errors import UserError


def at_least(minimum: float, group: Any, *names: str) -> None:
    """Raise UserError unless each named setting is unset, or finite and at least ``minimum``."""
    for name in names:
        value = getattr(group, name)
        if value is not None and not minimum <= value < math.inf:
            raise UserError(f"{flag(name)} {value} is out of range; it must be at least {minimum}")


def positive(group: Any, *names: str) -> None:
    """Raise UserError unless each named setting is unset, or finite and above 0."""
    for name in names:
        value = getattr(group, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{flag(name)} {value} is out of range; it must be above 0")


def fraction(group: Any, *names: str, below_one: bool = False) -> None:
    """Raise UserError unless each named setting is unset or in [0, 1]; in [0, 1) if ``below_one``."""
    for name in names:
        value = getattr(group, name)
        if value is not None and not (0 <= value <= 1 and (value < 1 or not below_one)):
            bounds = "at least 0 and below 1" if below_one else "between 0 and 1"
            raise UserError(f"{flag(name)} {value} is out of range; it must be {bounds}")
