"""Sample texts whose lengths in characters and in bytes differ, and files with them."""

import gzip
import json
from pathlib import Path
from typing import Any

import torch

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "über", "Fluß,", "naïve", "café"]


def sentence(seed: int, length: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (length,), generator=generator)
    return " ".join(WORDS[i] for i in picks)


def write_jsonl(path: Path, documents: list[dict[str, Any]]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(d) + "\n" for d in documents).encode()))


def choices(seed: int) -> list[str]:
    """Return four texts, some of which have twice as many bytes as characters."""
    return [sentence(10 * seed + i, 2) + "ß" * (10 * ((seed + i) % 2)) for i in range(4)]
