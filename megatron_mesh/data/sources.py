"""Plans a run's data on rank 0, which inspects the files. The other ranks only open what the plan lists."""

import hashlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_mesh.data import cache
from megatron_mesh.data.blend import Share, parse_blend
from megatron_mesh.data.epoch import epoch_index, epoch_key, tokens_in
from megatron_mesh.data.indexed import IndexedFacts, inspect_prefix
from megatron_mesh.data.stream import blend_index, blend_key
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import strict_json
from megatron_mesh.runtime.run_files import INDEX_CACHE_FOLDER


class Source(NamedTuple):
    """The settings of one stream: the words after ``flag``, and the share of their documents to use."""

    kind: Split
    flag: str
    words: list[str]
    split: str
    share: Share
    required: bool


class PartPlan(NamedTuple):
    """One prefix of a stream, as inspected by rank 0."""

    prefix: str
    weight: float
    facts: IndexedFacts
    documents: range
    key: cache.Key


class StreamPlan(NamedTuple):
    """The parts of a stream, and the cache key of their blend (None for a single part)."""

    parts: list[PartPlan]
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
        """Plan one stream. Returns None if it is optional and a part has less than one sequence.

        Raises:
            UserError: files are missing or damaged, or a part of a required stream has less than one
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

    def _part(self, prefix: str, weight: float, source: Source) -> PartPlan:
        facts = self._facts.get(prefix) or self._facts.setdefault(prefix, inspect_prefix(prefix, source.flag))
        first, last = (round(edge * facts.sequences) for edge in source.share)  # as Megatron's builder does
        documents = range(first, last)
        directory = Path(self._cache_path or f"{prefix}/{INDEX_CACHE_FOLDER}")
        key = epoch_key(
            directory, Path(prefix).name, facts.fingerprint, documents, self._seq_length, self._seed
        )
        return PartPlan(prefix, weight, facts, documents, key)

    def _too_few(self, part: PartPlan, split: Split, tokens: int) -> str:
        return (
            f"the {split.name} part of {part.prefix} has {tokens:,} tokens in {len(part.documents):,} of "
            f"{part.facts.sequences:,} documents, but one sequence needs {self._seq_length + 1:,} "
            "(--seq-length and a last label); give more data, a smaller --seq-length, or another --split (0 "
            "for no such part)"
        )

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

    def _build_epoch(self, part: PartPlan) -> None:
        facts = self._facts.get(part.prefix) or inspect_prefix(part.prefix)
        if facts != part.facts:
            raise UserError(
                f"the data {part.prefix} differ from those that rank 0 sees; copy the same files to all nodes"
            )
        data = IndexedDataset(part.prefix)
        _build(part.key, partial(epoch_index, data, part.documents, self._seq_length, self._seed))


def _build(key: cache.Key, make: cache.Make) -> None:
    try:
        cache.build(key, make)
    except OSError as error:
        raise UserError(
            f"the index cache {key.directory} cannot be written: {error}; give a writable --data-cache-path"
        ) from error


def _weights(parts: list[PartPlan]) -> list[float]:
    return [part.weight for part in parts]


def _tokens(part: PartPlan) -> int:
    return tokens_in(IndexedDataset(part.prefix), part.documents) if len(part.documents) else 0
