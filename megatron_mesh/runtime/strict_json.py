"""Strict JSON (RFC 8259), which every file and every output of ours is: a number that is not finite is null.

Python's own module writes NaN and Infinity, which other readers (jq, JavaScript, pandas) refuse.
"""

import json
import math
from typing import IO, Any


def loads(text: str | bytes) -> Any:
    """``json.loads``, with None in place of NaN and infinities, which earlier versions have written."""
    return json.loads(text, parse_constant=lambda name: None)


def dumps(value: Any, **options: Any) -> str:
    """``json.dumps``, with null in place of NaN and infinities."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False, **options)


def dump(value: Any, file: IO[str], **options: Any) -> None:
    """Write ``dumps(value)`` to a text file."""
    file.write(dumps(value, **options))


def finite(value: Any) -> Any:
    """``value`` with None in place of every float in it that is not finite."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None) -> float:
    """A number as it was before it was written: null stands for one that was not finite."""
    return math.nan if value is None else value
