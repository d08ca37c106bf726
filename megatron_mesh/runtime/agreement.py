"""Exchange Python objects between ranks, at start and in saves: from rank 0 to all, or from each to all.

That has a gloo group of its own, apart from those of training: messages need no GPU memory, and ranks
may wait for a slow one as long as a save may take.
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
"""Why a rank cannot go on, and the name of its host."""

_group: dist.ProcessGroup | None = None
"""None stands for the default group."""


@contextmanager
def separate_group(minutes: float) -> Iterator[None]:
    """Use a separate gloo group of all ranks for agreements inside; a collective operation.

    Args:
        minutes: how long a rank waits for the others before it fails.
    """
    global _group
    if _alone():
        yield
        return
    before, _group = _group, dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes))
    dist.barrier(_group)  # a rank that leaves at once would break the connections that others still make
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
    """Each distinct reason once, with the first rank and host that has it.

    Args:
        reasons: of all ranks, in their order.
        at_most: how many to spell out; the rest is counted.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for number, reason in enumerate(reasons):
        if reason is not None:
            said, host = reason
            found[said].append(f"rank {number} on {host}")
    sentences = [
        f"{said} ({places[0]}{f' and {others} more' if (others := len(places) - 1) else ''})"
        for said, places in found.items()
    ]
    left = len(sentences) - at_most
    return sentences if left <= 0 else [*sentences[:at_most], f"and {left} more reasons"]


def gather_reasons(reason: str | None) -> list[str]:
    """What any ranks complain of (``summarize_reasons``); a collective operation.

    Every rank gives its own ``reason``, or None.
    """
    return summarize_reasons(from_every_rank(with_host(reason)))


def on_every_rank(make: Callable[[], _Result]) -> _Result:
    """Call ``make`` on each rank; a collective operation.

    Raises:
        UserError: ``make`` raised it, or an OSError, on some rank. Every rank raises the first of these,
            which names its host and rank.
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
