"""Exchange Python objects between ranks, at start and in saves: from rank 0 to all, or from each to all."""

import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_mesh.errors import UserError

_Result = TypeVar("_Result")


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
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def from_every_rank(value: _Result) -> list[_Result]:
    """Return the ``value`` of each rank, in rank order; a collective operation."""
    if _alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def complaints(reason: str | None) -> list[str]:
    """Return each distinct complaint once, with the first rank and host that has it.

    A collective operation. Every rank passes its own ``reason``, or None.
    """
    found: dict[str, str] = {}
    gathered = from_every_rank(None if reason is None else (reason, socket.gethostname()))
    for number, complaint in enumerate(gathered):
        if complaint is not None:
            said, host = complaint
            found.setdefault(said, f"{said} (rank {number} on {host})")
    return list(found.values())


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
