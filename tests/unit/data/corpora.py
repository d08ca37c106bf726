"""Texts, files and a tokenizer of numbers for the tests of this folder."""

import json
from pathlib import Path

import numpy as np

_WORDS = np.array(
    ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "small", "cats"]
)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Texts of 3 to 60 words."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(_WORDS, random.integers(3, 60))) + "." for _ in range(count)]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> str:
    """Write a JSONL file and return its path as a string."""
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


class NumberTokenizer:
    """The parts of a tokenizer that GPTDataset needs, for data that are numbers."""

    vocab_size, eod, pad = 60_000, 0, -1
    unique_identifiers = {"class": "NumberTokenizer"}  # noqa: RUF012
