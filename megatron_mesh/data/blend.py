"""Parses --data-path and --split: prefixes with weights, and shares of the documents."""

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
"""Start and end, as fractions of the documents."""


class Part(NamedTuple):
    """One prefix of a blend and its weight; the weights of a blend sum to 1."""

    prefix: str
    weight: float


def parse_blend(words: list[str], flag: str) -> list[Part]:
    """Parse the words after ``flag``: ``PREFIX`` or ``WEIGHT PREFIX WEIGHT PREFIX ...``.

    Raises:
        UserError: weights and prefixes do not alternate, or a weight is not a positive number.
    """
    if len(words) == 1:
        return [Part(words[0], 1.0)]
    if not words or len(words) % 2:
        raise UserError(
            f"{flag} got {len(words)} words that are not pairs of WEIGHT PREFIX: {' '.join(words)}; give one "
            "prefix, or a blend WEIGHT PREFIX WEIGHT PREFIX ..."
        )
    weights = [_weight(word, flag) for word in words[::2]]
    return [Part(prefix, weight / sum(weights)) for prefix, weight in zip(words[1::2], weights, strict=True)]


def parse_sets(words: list[str], flag: str) -> dict[str, list[str]]:
    """Parse the words after ``flag`` into data sets: for each name, the words of its blend.

    ``NAME=PREFIX NAME=PREFIX ...`` are several sets; anything else is a single set with the name "". A name
    consists of letters, digits and ``._-``. A word is a path if data exist there, even with ``=``, such as
    ``lang=en/text``.

    Raises:
        UserError: a name is given twice or is reserved, or only some of the words have a name.
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
                f"{flag} mixes NAME=PREFIX ({names[0]}=...) with {other!r}; name all sets or none (a name "
                "has only letters, digits and ._-, and one prefix)"
            )
        return {"": words}
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{flag} has two sets named {name}; give each set a different name")
        if name in _RESERVED:
            raise UserError(
                f"{flag}: a set cannot be named {name}, because the log uses that name; rename the set"
            )
    return {name: [prefix] for name, prefix in named}


def _is_blend(words: list[str]) -> bool:
    return len(words) % 2 == 0 and not any("=" in word for word in words[::2])


def parse_split(split: str) -> list[Share | None]:
    """Parse the shares of training, validation and test, e.g. ``969,30,1``. A share of zero becomes None.

    Megatron's parser accepts any text that contains digits, so this checks the text first.

    Raises:
        UserError: the text is not one to three numbers, or a number is negative, or all are zero.
    """
    number = r"\s*(\d+\.?\d*|\.\d+)\s*"
    if not re.fullmatch(rf"{number}(,{number}){{0,2}}", split) or not re.search("[1-9]", split):
        raise UserError(
            f"--split {split!r} is not TRAIN,VALID,TEST; give three numbers, not all zero, e.g. 969,30,1"
        )
    return convert_split_vector_to_split_matrix(parse_and_normalize_split(split))


def _weight(word: str, flag: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(
            f"{flag}: the weight {word!r} is not a positive number; give WEIGHT PREFIX WEIGHT PREFIX ..."
        )
    return weight
