"""Exchange Python objects between ranks, when a run starts and when it saves.

The messages use a separate gloo group. They need no GPU memory, and its timeout is long enough for a save on
a slow rank.
"""

import socket
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_mesh.errors import UserError

_Result = TypeVar("_Result")

Reason = tuple[str, str] | None
"""Why a rank cannot continue, and the name of its host."""

_group: dist.ProcessGroup | None = None
"""None means the default group."""


@contextmanager
def separate_group(minutes: float) -> Iterator[None]:
    """Use a separate gloo group of all ranks for the exchanges inside; a collective operation.

    Args:
        minutes: how long a rank waits for the others before it fails.
    """
    global _group
    if _alone():
        yield
        return
    before, _group = _group, dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes))
    dist.barrier(_group)  # a rank that leaves early would break connections that others are still making
    try:
        yield
    finally:
        group, _group = _group, before
        dist.destroy_process_group(group)


def from_rank_zero(make: Callable[[], _Result]) -> _Result:
    """Return on every rank what ``make`` returns on rank 0; a collective operation.

    Raises:
        UserError: ``make`` raised it on rank 0; every rank raises it.
    """
    if _alone():
        return make()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0, group=_group)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def from_every_rank(value: _Result) -> list[_Result]:
    """Return the ``value`` of each rank, in rank order; a collective operation."""
    if _alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_group)
    return values


def to_rank_zero(value: _Result) -> list[_Result]:
    """Return the ``value`` of each rank on rank 0, an empty list on the others; a collective operation."""
    if _alone():
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=_group)
    return values or []


def with_host(reason: str | None) -> Reason:
    """``reason`` with the name of this rank's host."""
    return None if reason is None else (reason, socket.gethostname())


def summarize_reasons(reasons: Sequence[Reason], at_most: int = 5) -> list[str]:
    """List each distinct reason once, with the first rank and host that gave it.

    Args:
        reasons: those of all ranks, in rank order.
        at_most: how many to spell out; the others are counted.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for number, reason in enumerate(reasons):
        if reason is not None:
            text, host = reason
            found[text].append(f"rank {number} on {host}")
    sentences = [
        f"{text} ({places[0]}{f' and {others} more' if (others := len(places) - 1) else ''})"
        for text, places in found.items()
    ]
    left = len(sentences) - at_most
    return sentences if left <= 0 else [*sentences[:at_most], f"and {left} more reasons"]


def gather_reasons(reason: str | None) -> list[str]:
    """Collect every rank's ``reason``, or None, and list the distinct ones; a collective operation."""
    return summarize_reasons(from_every_rank(with_host(reason)))


def on_every_rank(make: Callable[[], _Result]) -> _Result:
    """Call ``make`` on each rank; a collective operation.

    Raises:
        UserError: ``make`` raised a UserError or an OSError on some rank. Every rank raises the first one,
            with the name of its rank and host.
    """
    result, problem = None, ""
    try:
        result = make()
    except (UserError, OSError) as error:
        if _alone() and isinstance(error, UserError):
            raise
        problem = f"{error} (rank {rank()} on host {socket.gethostname()})"
    if problem := next(filter(None, from_every_rank(problem)), ""):
        raise UserError(problem)
    return result  # type: ignore[return-value]


def rank() -> int:
    """Index of this process, 0 without torch.distributed."""
    return 0 if _alone() else dist.get_rank()


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1
