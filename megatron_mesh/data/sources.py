"""Plans what a run reads: which files and documents, in which blend, from --data-path and --split.

Rank 0 inspects the files and plans each stream (training, validation, test). The other ranks only open what
the plan lists (``datasets.py``).
"""

import hashlib
import math
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_mesh.data import cache
from megatron_mesh.data.indexed import IndexedFacts, inspect_prefix
from megatron_mesh.data.stream import blend_index, blend_key, epoch_index, epoch_key, tokens_in
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import strict_json
from megatron_mesh.runtime.run_files import INDEX_CACHE_FOLDER

_RESERVED = ("loss", "perplexity")

Share = tuple[float, float]
"""Start and end, as fractions of the documents."""


class BlendEntry(NamedTuple):
    """One prefix of a blend and its weight; the weights of a blend sum to 1."""

    prefix: str
    weight: float


def parse_blend(words: list[str], flag: str) -> list[BlendEntry]:
    """Parse the words after ``flag``: ``PREFIX`` or ``WEIGHT PREFIX WEIGHT PREFIX ...``.

    Raises:
        UserError: weights and prefixes do not alternate, or a weight is not a positive number.
    """
    if len(words) == 1:
        return [BlendEntry(words[0], 1.0)]
    if not words or len(words) % 2:
        raise UserError(
            f"{flag} got {len(words)} words that are not pairs of WEIGHT PREFIX: {' '.join(words)}; give one "
            "prefix, or a blend WEIGHT PREFIX WEIGHT PREFIX ..."
        )
    weights = [_parse_weight(word, flag) for word in words[::2]]
    return [
        BlendEntry(prefix, weight / sum(weights)) for prefix, weight in zip(words[1::2], weights, strict=True)
    ]


def parse_sets(words: list[str], flag: str) -> dict[str, list[str]]:
    """Parse the words after ``flag`` into data sets: for each name, the words of its blend.

    ``NAME=PREFIX NAME=PREFIX ...`` are several sets; anything else is a single set with the name "". A name
    consists of letters, digits and ``._-``. A word such as ``lang=en/text`` is a path if data exist there.

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


def _parse_weight(word: str, flag: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(
            f"{flag}: the weight {word!r} is not a positive number; give WEIGHT PREFIX WEIGHT PREFIX ..."
        )
    return weight


class Source(NamedTuple):
    """The settings of one stream: the words after ``flag``, and the share of the documents to use."""

    kind: Split
    flag: str
    words: list[str]
    split: str
    share: Share
    required: bool


class SourcePlan(NamedTuple):
    """One prefix of a stream, as rank 0 has inspected it."""

    prefix: str
    weight: float
    facts: IndexedFacts
    documents: range
    key: cache.Key


class StreamPlan(NamedTuple):
    """The prefixes of a stream, and the cache key of their blend (None for a single prefix)."""

    parts: list[SourcePlan]
    num_samples: int
    blend: cache.Key | None

    @property
    def order(self) -> str:
        """A digest of everything that determines the samples: data, documents, weights, seed and length."""
        parts = [(part.weight, part.key.description) for part in self.parts]
        return hashlib.sha256(strict_json.dumps(parts).encode()).hexdigest()[:32]


class Planner:
    """Plans the streams of one run. Inspects each prefix only once.

    Args:
        cache_path: --data-cache-path. By default the index of a prefix is in ``PREFIX/cache``.
    """

    def __init__(self, cache_path: str | None, seq_length: int, seed: int) -> None:
        self._cache_path, self._seq_length, self._seed = cache_path, seq_length, seed
        self._facts: dict[str, IndexedFacts] = {}

    def stream(self, source: Source, num_samples: int) -> StreamPlan | None:
        """Plan one stream. Returns None if it is optional and a prefix has less than one sequence.

        Raises:
            UserError: files are missing or damaged, or a prefix of a required stream has less than one
                sequence.
        """
        parts = []
        for prefix, weight in parse_blend(source.words, source.flag):
            part = self._part(prefix, weight, source)
            if cache.load(part.key) is None and (tokens := _tokens(part)) <= self._seq_length:
                if not source.required:
                    return None
                raise UserError(self._too_few(part, source.kind, tokens))
            parts.append(part)
        if len(parts) == 1:
            return StreamPlan(parts, num_samples, None)
        directory = parts[0].key.directory
        return StreamPlan(parts, num_samples, blend_key(directory, _weights(parts), num_samples))

    def build(self, streams: Iterable[StreamPlan]) -> None:
        """Build the cache entries of ``streams`` that are missing on this node.

        Raises:
            UserError: the cache cannot be written, or the data differ from those in the plan.
        """
        for stream in streams:
            for part in stream.parts:
                if cache.load(part.key) is None:
                    self._build_epoch(part)
            if stream.blend is not None:
                weights, count = _weights(stream.parts), stream.num_samples
                _build(stream.blend, partial(blend_index, weights, count))

    def _part(self, prefix: str, weight: float, source: Source) -> SourcePlan:
        facts = self._facts.get(prefix) or self._facts.setdefault(prefix, inspect_prefix(prefix, source.flag))
        first, last = (round(edge * facts.sequences) for edge in source.share)  # as Megatron's builder does
        documents = range(first, last)
        directory = Path(self._cache_path or f"{prefix}/{INDEX_CACHE_FOLDER}")
        key = epoch_key(
            directory, Path(prefix).name, facts.fingerprint, documents, self._seq_length, self._seed
        )
        return SourcePlan(prefix, weight, facts, documents, key)

    def _too_few(self, part: SourcePlan, split: Split, tokens: int) -> str:
        return (
            f"the {split.name} split of {part.prefix} has {tokens:,} tokens in {len(part.documents):,} of "
            f"{part.facts.sequences:,} documents, but one sequence needs {self._seq_length + 1:,} "
            "(--seq-length plus a last label); give more data, a smaller --seq-length, or another --split (0 "
            "for no data)"
        )

    def _build_epoch(self, part: SourcePlan) -> None:
        facts = self._facts.get(part.prefix) or inspect_prefix(part.prefix)
        if facts != part.facts:
            raise UserError(
                f"the data {part.prefix} differ from those that rank 0 sees; copy the same files to all nodes"
            )
        data = IndexedDataset(part.prefix)
        _build(part.key, partial(epoch_index, data, part.documents, self._seq_length, self._seed))


def _build(key: cache.Key, make: cache.Make) -> None:
    try:
        cache.build_entry(key, make)
    except OSError as error:
        raise UserError(
            f"the index cache {key.directory} cannot be written: {error}; give a writable --data-cache-path"
        ) from error


def _weights(parts: list[SourcePlan]) -> list[float]:
    return [part.weight for part in parts]


def _tokens(part: SourcePlan) -> int:
    return tokens_in(IndexedDataset(part.prefix), part.documents) if len(part.documents) else 0
