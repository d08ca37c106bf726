"""Micro-batches for one data-parallel rank, in an order that neither ranks nor loader processes change."""

import atexit
import gc
import signal
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

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


def sample_ids(step: int, global_batch_size: int) -> range:
    """The samples of global batch ``step`` (from 0) of a run with a constant batch size."""
    return range(step * global_batch_size, (step + 1) * global_batch_size)


class RankSampler(Sampler[list[int]]):
    """The samples of each micro-batch of one rank, from sample ``consumed_samples`` on.

    A global batch is ``global_batch_size`` consecutive samples; rank r takes the r-th of ``dp_size`` equal
    runs of them, cut into micro-batches. An incomplete global batch at the end is left out.
    Raises UserError when the global batch does not divide.
    """

    def __init__(
        self,
        num_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        assert 0 <= dp_rank < dp_size and consumed_samples >= 0
        if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % (micro_batch_size * dp_size):
            raise UserError(
                f"--global-batch-size {global_batch_size} is not a multiple of --micro-batch-size "
                f"{micro_batch_size} x {dp_size} data-parallel ranks; change one of them."
            )
        share = global_batch_size // dp_size
        self._micro = micro_batch_size
        self._offsets = range(dp_rank * share, (dp_rank + 1) * share, micro_batch_size)
        self._starts = range(consumed_samples, num_samples - global_batch_size + 1, global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts:
            for offset in self._offsets:
                first = start + offset
                yield list(range(first, first + self._micro))

    def __len__(self) -> int:
        return len(self._starts) * len(self._offsets)


def build_loader(
    dataset: Dataset[dict[str, torch.Tensor]],
    *,
    consumed_samples: int,
    micro_batch_size: int,
    global_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This rank's micro-batches, from global sample ``consumed_samples`` to the end of ``dataset``.

    ``num_workers`` processes read ahead (0: the caller reads); they change neither the order nor the global
    random state. Raises UserError when the global batch does not divide.
    """
    sampler = RankSampler(
        len(dataset),  # type: ignore[arg-type]
        consumed_samples,
        micro_batch_size,
        global_batch_size,
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
            samples._shutdown_workers()  # type: ignore[attr-defined]  # torch's own, but not left to __del__


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
