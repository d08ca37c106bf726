"""An endless, repeatable stream of samples from one data set or a blend of several.

Sample j depends on the data, the seed, the weights and j alone. Megatron sizes its indices by the length of
the run, which changes the order of all samples when a run is extended; here every data set is indexed for
one epoch, and the stream repeats the epochs, each in an order of its own.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset


class Origin(NamedTuple):
    """Where a sample is from: the prefix, how often it was read through before, the place in one epoch."""

    prefix: str
    epoch: int
    position: int


class Part(NamedTuple):
    """One data set of a blend: ``dataset`` holds one epoch, ``weight`` is its share (of a sum of 1)."""

    prefix: str
    weight: float
    dataset: GPTDataset


class SampleStream(torch.utils.data.Dataset):
    """The first ``num_samples`` samples of the stream.

    A blend takes the data set that lags furthest behind its weight (Megatron's build_blending_indices, which
    is greedy: a longer stream begins with the shorter one). The choice costs 10 bytes a sample.
    """

    def __init__(self, parts: list[Part], seed: int, num_samples: int) -> None:
        self.parts = parts
        self.seed = seed
        self.num_samples = num_samples
        self._part_of: np.ndarray | None = None
        if len(parts) > 1:
            self._part_of = np.zeros(num_samples, np.int16)
            self._sample_of = np.zeros(num_samples, np.int64)
            weights = np.array([part.weight for part in parts])
            helpers.build_blending_indices(
                self._part_of, self._sample_of, weights, len(parts), num_samples, False
            )

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        """Sample ``sample``: tokens, labels, position_ids (int64) and loss_mask (float32), each [S]."""
        part, _, position = self._locate(sample)
        return part.dataset[position]

    def origin(self, sample: int) -> Origin:
        """Name where sample ``sample`` comes from."""
        part, epoch, position = self._locate(sample)
        return Origin(part.prefix, epoch, position)

    def _locate(self, sample: int) -> tuple[Part, int, int]:
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} of {self.num_samples}")
        part = self.parts[0]
        if self._part_of is not None:
            part, sample = self.parts[self._part_of[sample]], int(self._sample_of[sample])
        epoch, offset = divmod(sample, len(part.dataset))
        stride, shift = epoch_order(self.seed, epoch, len(part.dataset))
        return part, epoch, (offset * stride + shift) % len(part.dataset)


@lru_cache(maxsize=256)
def epoch_order(seed: int, epoch: int, samples: int) -> tuple[int, int]:
    """Stride and shift of an epoch: its i-th sample is ``(i * stride + shift) % samples`` of the first epoch.

    The first epoch is in Megatron's shuffled order. A later one walks through that order with a random stride
    that shares no factor with ``samples``, so it meets every sample once and needs no memory, where a
    permutation would need 8 bytes a sample in every loader process.
    """
    if epoch == 0:
        return 1, 0
    random: Any = np.random.default_rng([seed, epoch])
    stride = 0
    while math.gcd(stride, samples) != 1:
        stride = int(random.integers(1, samples + 1))
    return stride, int(random.integers(samples))
