"""An endless, reproducible stream of samples from one data set or a blend of several.

Sample j depends only on the data, the seed, the weights and j. Megatron's indices also depend on the length
of the run, so extending a run would change the order of all samples. Here every data set is indexed for one
epoch: Megatron's GPTDataset, with its index in our cache. The stream repeats that epoch, each time in a
different order.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_mesh.compat.megatron_data import IndexedGPTDataset, document_order, sample_order
from megatron_mesh.data.cache import Arrays, Key
from megatron_mesh.runtime import strict_json

_EXTRA_TOKEN = 1  # a sample has one token more than its sequence, for the last label


class Origin(NamedTuple):
    """Where a sample comes from: the prefix, the number of earlier epochs, and the position in the epoch."""

    prefix: str
    epoch: int
    position: int


class StreamSource(NamedTuple):
    """One data set of a blend: ``dataset`` is one epoch of it; all ``weight`` values sum to 1."""

    prefix: str
    weight: float
    dataset: GPTDataset


class SampleStream(torch.utils.data.Dataset):
    """The first ``num_samples`` samples of the stream.

    Args:
        blend: the result of ``blend_index``, memory-mapped: 10 bytes per sample, shared by the processes of a
            node. None for a single data set.
        order: a digest of everything that determines the samples and their order, except for their number.
    """

    def __init__(
        self,
        parts: list[StreamSource],
        seed: int,
        num_samples: int,
        blend: Arrays | None = None,
        order: str = "",
    ) -> None:
        assert (len(parts) > 1) == (blend is not None)
        self.parts = parts
        self.seed = seed
        self.num_samples = num_samples
        self.order = order
        self._blend = blend

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        """Return tokens, labels, position_ids (int64) and loss_mask (float32) of a sample, each [S]."""
        part, _, position = self._locate(sample)
        return part.dataset[position]

    def origin(self, sample: int) -> Origin:
        """Return where a sample comes from."""
        part, epoch, position = self._locate(sample)
        return Origin(part.prefix, epoch, position)

    def _locate(self, sample: int) -> tuple[StreamSource, int, int]:
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} of {self.num_samples}")
        part = self.parts[0]
        if self._blend is not None:
            part = self.parts[self._blend["part_of"][sample]]
            sample = int(self._blend["sample_of"][sample])
        epoch, offset = divmod(sample, len(part.dataset))
        stride, shift = epoch_order(self.seed, epoch, len(part.dataset))
        return part, epoch, (offset * stride + shift) % len(part.dataset)


@lru_cache(maxsize=256)
def epoch_order(seed: int, epoch: int, samples: int) -> tuple[int, int]:
    """Return stride and shift: sample i of ``epoch`` is sample ``(i * stride + shift) % samples`` of epoch 0.

    Epoch 0 is in Megatron's shuffled order. Later ones walk through that order with a random stride that is
    coprime to ``samples``, so they visit every sample once. A permutation would take 8 bytes per sample in
    every loader process; this takes none.
    """
    if epoch == 0:
        return 1, 0
    random: Any = np.random.default_rng([seed, epoch])
    stride = 0
    while math.gcd(stride, samples) != 1:
        stride = int(random.integers(1, samples + 1))
    return stride, int(random.integers(samples))


def blend_key(cache: Path, weights: Sequence[float], num_samples: int) -> Key:
    """Return the cache key of a blend's index, which assigns a data set to each sample."""
    description = {"index": "blend", "weights": list(weights), "samples": num_samples}
    return Key(cache, "blend", strict_json.dumps(description))


def blend_index(weights: Sequence[float], num_samples: int) -> Arrays:
    """Return each sample's data set, [num_samples] int16, and its number there, [num_samples] int64.

    Megatron's build_blending_indices takes each sample from the data set that is furthest behind its weight.
    So a longer stream begins with the same samples.
    """
    part_of = np.zeros(num_samples, np.int16)
    sample_of = np.zeros(num_samples, np.int64)
    helpers.build_blending_indices(part_of, sample_of, np.array(weights), len(weights), num_samples, False)
    return {"part_of": part_of, "sample_of": sample_of}


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


def epoch_key(cache: Path, name: str, fingerprint: str, documents: range, seq_length: int, seed: int) -> Key:
    """Return the cache key of the index of ``documents``.

    It identifies the data by content, not by path. So data that were rewritten never use an old index, and a
    cache works on machines that mount the data at another path.
    """
    description = {
        "index": "one epoch",
        "data": fingerprint,
        "documents": [documents.start, documents.stop],
        "sequence_length": seq_length,
        "seed": seed,
    }
    return Key(cache, name, strict_json.dumps(description))


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


def tokens_in(data: IndexedDataset, documents: range) -> int:
    """Return the number of tokens in ``documents``."""
    return int(data.sequence_lengths[documents.start : documents.stop].sum(dtype=np.int64))
