"""Parsing --data-path and --split: prefixes with weights, and shares of the documents."""

import math
import re
from pathlib import Path
from typing import NamedTuple

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

from megatron_mesh.errors import UserError

_RESERVED = ("loss", "perplexity")

Share = tuple[float, float]
"""From where to where, in fractions of the documents."""


class Part(NamedTuple):
    """One prefix of a blend and its weight; the weights of a blend sum to 1."""

    prefix: str
    weight: float


def parse_blend(words: list[str], flag: str) -> list[Part]:
    """``[PREFIX]`` or ``[WEIGHT, PREFIX, WEIGHT, PREFIX, ...]``, given to ``flag``.

    Raises UserError when weights and prefixes do not alternate or a weight is not a positive number.
    """
    if len(words) == 1:
        return [Part(words[0], 1.0)]
    if not words or len(words) % 2:
        raise UserError(
            f"{flag} takes one prefix, or a blend WEIGHT PREFIX WEIGHT PREFIX ...; these {len(words)} words "
            f"do not pair up: {' '.join(words)}"
        )
    weights = [_weight(word, flag) for word in words[::2]]
    return [Part(prefix, weight / sum(weights)) for prefix, weight in zip(words[1::2], weights, strict=True)]


def parse_sets(words: list[str], flag: str) -> dict[str, list[str]]:
    """The sets that ``flag`` names, each with the words of its blend.

    ``[NAME=PREFIX, ...]`` gives several; anything else is one set, whose name is "". A name holds letters,
    digits and ``._-``. A word under which there are data is a path, as ``lang=en/text`` may be.

    Raises UserError when a name is given twice or means something else in the log, or when only some of the
    words have a name.
    """
    named = [
        match.groups()
        for word in words
        if (match := re.fullmatch(r"([\w.-]+)=(.+)", word)) and not Path(f"{word}.idx").exists()
    ]
    names = [name for name, _ in named]
    if len(named) < len(words):
        if named and not _is_blend(words):
            other = next(word for word in words if not re.fullmatch(r"[\w.-]+=.+", word))
            raise UserError(
                f"{flag} mixes NAME=PREFIX ({names[0]}=...) with {other!r}, which is not one: a name has "
                "letters, digits and ._- alone, and one prefix; name all sets or none"
            )
        return {"": words}
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{flag} gives the name {name} twice; each set needs a name of its own")
        if name in _RESERVED:
            raise UserError(
                f"{flag}: a set cannot be named {name}, which has a meaning in the log; rename it"
            )
    return {name: [prefix] for name, prefix in named}


def _is_blend(words: list[str]) -> bool:
    return len(words) % 2 == 0 and not any("=" in word for word in words[::2])


def parse_split(split: str) -> list[Share | None]:
    """Shares of training, validation and test, e.g. ``969,30,1``; None where the share is zero.

    Raises UserError unless the text is one to three numbers, none negative and not all zero. Megatron's own
    parser picks whatever digits it finds, so the text is checked first.
    """
    number = r"\s*(\d+\.?\d*|\.\d+)\s*"
    if not re.fullmatch(rf"{number}(,{number}){{0,2}}", split) or not re.search("[1-9]", split):
        raise UserError(f"--split {split!r} is not TRAIN,VALID,TEST, e.g. 969,30,1: numbers, not all zero.")
    return convert_split_vector_to_split_matrix(parse_and_normalize_split(split))


def _weight(word: str, flag: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(f"{flag}: {word!r} stands where a weight belongs and is not a number above 0.")
    return weight
