"""Read and write strict JSON (RFC 8259), with null for NaN and infinities.

Python's json module writes NaN and Infinity, which jq, JavaScript and pandas reject.
"""

import json
import math
from typing import IO, Any


def loads(text: str | bytes) -> Any:
    """Like ``json.loads``, but return None for NaN and infinities, which earlier versions wrote."""
    return json.loads(text, parse_constant=lambda name: None)


def dumps(value: Any, **options: Any) -> str:
    """Like ``json.dumps``, but write null for NaN and infinities."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False, **options)


def dump(value: Any, file: IO[str], **options: Any) -> None:
    """Write ``dumps(value)`` to a text file."""
    file.write(dumps(value, **options))


def finite(value: Any) -> Any:
    """Return ``value`` with None for every float that isn't finite."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None) -> float:
    """Return a number that was read back: NaN for None, which stands for a number that wasn't finite."""
    return math.nan if value is None else value
