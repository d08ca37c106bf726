"""One epoch of one data set: Megatron's GPTDataset, with its index in our cache."""

from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_mesh.compat.megatron_data import IndexedGPTDataset, document_order, sample_order
from megatron_mesh.data.cache import Arrays, Key
from megatron_mesh.runtime import strict_json

_EXTRA_TOKEN = 1  # a sample has one token more than its sequence, for the last label


def epoch_key(cache: Path, name: str, fingerprint: str, documents: range, seq_length: int, seed: int) -> Key:
    """Return the cache key of the index of ``documents``.

    It identifies the data by content, not by path. So rewritten data never use an old index, and a cache
    works on machines that mount the data at another path.
    """
    description = {
        "index": "one epoch",
        "data": fingerprint,
        "documents": [documents.start, documents.stop],
        "sequence_length": seq_length,
        "seed": seed,
    }
    return Key(cache, name, strict_json.dumps(description))


def tokens_in(data: IndexedDataset, documents: range) -> int:
    """Return the number of tokens in ``documents``."""
    return int(data.sequence_lengths[documents.start : documents.stop].sum(dtype=np.int64))


def epoch_index(data: IndexedDataset, documents: range, seq_length: int, seed: int) -> Arrays:
    """Build the three arrays that GPTDataset builds for one epoch, bit for bit.

    We don't use GPTDataset for this because it builds only on rank 0 and does not write atomically.
    """
    random = np.random.RandomState(seed)
    order = document_order(documents, random)
    lengths = data.sequence_lengths
    if 2 * len(order) > len(lengths):
        lengths = lengths.copy()  # C++ reads it in random order, which is slow in a memory-mapped file
    samples = helpers.build_sample_idx(
        lengths, order, seq_length, 1, tokens_in(data, documents), True, _EXTRA_TOKEN
    )
    count = samples.shape[0] - 1
    return {
        "document_index": order,
        "sample_index": samples,
        "shuffle_index": sample_order(count, random),
    }


class Epoch(IndexedGPTDataset):
    """One epoch of samples.

    Args:
        index: the result of ``epoch_index``, memory-mapped.
        leave_out_eod: exclude predictions of end-of-document tokens from the loss. (Megatron's
            ``eod_mask_loss`` excludes the predictions after them.)
    """

    def __init__(
        self,
        data: IndexedDataset,
        name: str,
        documents: range,
        index: Arrays,
        split: Split,
        config: GPTDatasetConfig,
        *,
        leave_out_eod: bool = False,
    ) -> None:
        self._index, self._leave_out_eod = index, leave_out_eod
        super().__init__(data, name, documents, None, split, config)

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(idx)
        if self._leave_out_eod:
            # Not in place: GPTDataset reuses the mask of the first sample for the others.
            sample["loss_mask"] = sample["loss_mask"] * (sample["labels"] != self.config.tokenizer.eod)
        return sample

    def index_arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See ``IndexedGPTDataset``."""
        index = self._index
        return index["document_index"], index["sample_index"], index["shuffle_index"]
