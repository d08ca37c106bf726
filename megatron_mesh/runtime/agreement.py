"""One rank works or looks, all ranks know; any rank complains, all ranks hear it."""

import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_mesh.errors import UserError

_Result = TypeVar("_Result")


def from_rank_zero(work: Callable[[], _Result]) -> _Result:
    """What ``work`` returns on rank 0; a collective operation.

    Raises:
        UserError: on all ranks, if rank 0's work raises it.
    """
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box = [work(), None]
        except UserError as error:
            box = [None, str(error)]
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def complaints(reason: str | None) -> list[str]:
    """What any ranks complain of, each distinct reason once, with the first rank and host that has it.

    A collective operation; every rank gives its own ``reason``, or None.
    """
    gathered: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, None if reason is None else (reason, socket.gethostname()))
    found: dict[str, str] = {}
    for rank, complaint in enumerate(gathered):
        if complaint is not None:
            found.setdefault(complaint[0], f"{complaint[0]} (rank {rank} on {complaint[1]})")
    return list(found.values())
