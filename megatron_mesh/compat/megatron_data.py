"""Internals of Megatron-core's indexed data sets: the header of .idx files and the index of an epoch."""

from abc import abstractmethod
from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import (
    GPTDataset,
    _build_document_index,
    _build_shuffle_index,
)
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType, _IndexWriter

INDEX_HEADER: bytes = _INDEX_HEADER
"""The first bytes of every .idx file."""


class NumpyIndexWriter(_IndexWriter):
    """Megatron's writer of .idx files, with its loop over the documents replaced by one cumulative sum."""

    def _sequence_pointers(self, sequence_lengths: np.ndarray) -> np.ndarray:
        ends = np.cumsum(sequence_lengths, dtype=np.int64) * DType.size(self.dtype)
        return np.concatenate(([0], ends[:-1]))


class IndexedGPTDataset(GPTDataset):
    """A ``GPTDataset`` that is given its index; the original builds one on rank 0 and writes it in place."""

    @abstractmethod
    def index_arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document, sample and shuffle index. ``GPTDataset.__init__`` calls this."""

    def _build_document_sample_shuffle_indices(self) -> Any:
        return self.index_arrays()


def document_order(documents: range, random: np.random.RandomState) -> np.ndarray:
    """The order of the documents in one epoch, as ``GPTDataset`` draws it."""
    return _build_document_index(np.arange(documents.start, documents.stop, dtype=np.int32), 1, random, False)


def sample_order(count: int, random: np.random.RandomState) -> np.ndarray:
    """The order of an epoch's samples, as ``GPTDataset`` draws it."""
    return _build_shuffle_index(count, count, random)
