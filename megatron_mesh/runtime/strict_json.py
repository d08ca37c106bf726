"""Read and write strict JSON (RFC 8259): a number that is not finite becomes null.

Python's own module writes NaN and Infinity, which other readers (jq, JavaScript, pandas) reject.
"""

import json
import math
from typing import IO, Any


def loads(text: str | bytes) -> Any:
    """``json.loads``, but None for NaN and infinities, which earlier versions wrote."""
    return json.loads(text, parse_constant=lambda name: None)


def dumps(value: Any, **options: Any) -> str:
    """``json.dumps``, but null for NaN and infinities."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False, **options)


def dump(value: Any, file: IO[str], **options: Any) -> None:
    """Write ``dumps(value)`` to a text file."""
    file.write(dumps(value, **options))


def finite(value: Any) -> Any:
    """Replace every float in ``value`` that is not finite by None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None) -> float:
    """Read back a number: null, which was written for one that is not finite, becomes NaN."""
    return math.nan if value is None else value
