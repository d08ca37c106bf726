"""Micro-batches for one data-parallel rank, in an order that neither ranks nor loader processes change."""

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
    """[B, S] int64: at each place the token that follows."""
    loss_mask: torch.Tensor
    """[B, S] float32: 1 where the prediction counts, 0 where it does not."""
    position_ids: torch.Tensor
    """[B, S] int64."""


class RankSampler(Sampler[list[int]]):
    """The samples of each micro-batch of one rank, from sample ``consumed_samples`` on.

    The global batch that begins after n samples is the next ``batch_size(n)`` samples; rank r takes the
    r-th of ``dp_size`` equal runs of them, cut into micro-batches. An incomplete global batch at the end is
    left out. Raises UserError when a global batch does not divide.
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
        """Samples of each rank in the global batch that begins at ``start``."""
        size = self._batch_size(start)
        if self._micro < 1 or size < 1 or size % (self._micro * self._ranks):
            raise UserError(
                f"a global batch of {size} is not a multiple of --micro-batch-size {self._micro} x "
                f"{self._ranks} data-parallel ranks; change one of them."
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
    """This rank's micro-batches, from global sample ``consumed_samples`` to the end of ``dataset``.

    ``global_batch_size`` may be a function of the samples consumed so far (a ramp-up). ``num_workers``
    processes read ahead (0: the caller reads); they change neither the order nor the global random state.
    Raises UserError when the global batch does not divide.
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
        generator=torch.Generator(),  # else each new iterator draws from the global one, and a resume differs
    )
    batches = _batches(loader)
    _open_loaders.add(batches)
    return batches


def _batches(loader: DataLoader[dict[str, torch.Tensor]]) -> Generator[Batch, None, None]:
    if loader.num_workers:
        # Loader processes are forks. What is garbage here must not be collected there: destroyed process
        # groups, for example, would join threads that a fork does not have.
        gc.collect()
    with _signals_held():
        samples = iter(loader)
    try:
        for sample in samples:
            yield Batch(sample["tokens"], sample["labels"], sample["loss_mask"], sample["position_ids"])
    finally:
        if loader.num_workers:
            end_workers(samples)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started in this context never see the signals that end or interrupt a whole job.

    The main process alone decides on those: a loader killed by SLURM's SIGTERM would fail it in the middle
    of its last save. A mask is inherited; a handler would leave a gap while the process starts.
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
    """End loader processes still open at exit: Python would send them SIGTERM, and wait for ever."""
    for batches in list(_open_loaders):
        batches.close()
