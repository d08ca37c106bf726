"""Reads micro-batches for one data-parallel rank, in an order that does not depend on loader processes."""

import atexit
import gc
import signal
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_mesh.compat.torch_internals import end_workers
from megatron_mesh.errors import UserError


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B sequences of S tokens, on the CPU."""

    tokens: torch.Tensor
    """[B, S] int64: the input."""
    labels: torch.Tensor
    """[B, S] int64: for each position, the next token."""
    loss_mask: torch.Tensor
    """[B, S] float32: 1 if the prediction counts in the loss, otherwise 0."""
    position_ids: torch.Tensor
    """[B, S] int64."""


class RankSampler(Sampler[list[int]]):
    """Yields the sample numbers of one rank's micro-batches, starting at sample ``consumed_samples``.

    The global batch that begins after n samples has the next ``batch_size(n)`` samples. It is divided into
    ``dp_size`` equal parts; rank r takes the r-th part in micro-batches. An incomplete last batch is dropped.

    Raises:
        UserError: a global batch cannot be divided evenly.
    """

    def __init__(
        self,
        num_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        batch_size: Callable[[int], int],
        dp_rank: int,
        dp_size: int,
    ) -> None:
        assert 0 <= dp_rank < dp_size and consumed_samples >= 0
        self._num_samples, self._consumed, self._micro = num_samples, consumed_samples, micro_batch_size
        self._batch_size, self._rank, self._ranks = batch_size, dp_rank, dp_size
        self._share(consumed_samples)

    def _share(self, start: int) -> int:
        """Return the number of samples per rank in the global batch that begins at ``start``."""
        size = self._batch_size(start)
        if self._micro < 1 or size < 1 or size % (self._micro * self._ranks):
            raise UserError(
                f"a global batch of {size} is not a multiple of --micro-batch-size {self._micro} x "
                f"{self._ranks} data-parallel ranks; change one of them"
            )
        return size // self._ranks

    def __iter__(self) -> Iterator[list[int]]:
        start = self._consumed
        while start + (share := self._share(start)) * self._ranks <= self._num_samples:
            for offset in range(self._rank * share, (self._rank + 1) * share, self._micro):
                yield list(range(start + offset, start + offset + self._micro))
            start += share * self._ranks


def build_loader(
    dataset: Dataset[dict[str, torch.Tensor]],
    *,
    consumed_samples: int,
    micro_batch_size: int,
    global_batch_size: int | Callable[[int], int],
    dp_rank: int,
    dp_size: int,
    num_workers: int,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Return this rank's micro-batches, from sample ``consumed_samples`` to the end of ``dataset``.

    Args:
        global_batch_size: a number, or a function of the samples consumed so far (batch-size ramp-up).
        num_workers: processes that read ahead; with 0 the caller reads. They change neither the order nor the
            global random state.

    Raises:
        UserError: a global batch cannot be divided evenly.
    """
    sampler = RankSampler(
        len(dataset),  # type: ignore[arg-type]
        consumed_samples,
        micro_batch_size,
        global_batch_size if callable(global_batch_size) else lambda consumed: global_batch_size,
        dp_rank,
        dp_size,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the global one would advance here, so a resumed run would differ
    )
    batches = _batches(loader)
    _open_loaders.add(batches)
    return batches


def _batches(loader: DataLoader[dict[str, torch.Tensor]]) -> Generator[Batch, None, None]:
    if loader.num_workers:
        # Loader processes are forks, in which collecting our garbage could hang: destroyed process groups,
        # for example, join threads that a fork does not have.
        gc.collect()
    with _signals_held():
        samples = iter(loader)
    try:
        for sample in samples:
            yield Batch(sample["tokens"], sample["labels"], sample["loss_mask"], sample["position_ids"])
    finally:
        if loader.num_workers:
            end_workers(samples)  # now, not at some later __del__


@contextmanager
def _signals_held() -> Iterator[None]:
    """Start processes that ignore the signals which end or interrupt a job.

    Only the main process reacts to those: if SLURM's SIGTERM killed a loader process, the main process would
        fail in the middle of its last save. A signal mask is inherited, so unlike a handler it leaves no gap
        while a
    process starts.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_open_loaders: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()


@atexit.register
def _close_loaders() -> None:
    """End loader processes at exit. Python would send them SIGTERM, which they ignore, and wait forever."""
    for batches in list(_open_loaders):
        batches.close()
