"""What all ranks agree on in a step: loss, gradient norm, whether to update, when to stop.

A loss or gradient that is not finite would spoil the weights for good, even if it occurs on one rank only. A
signal to stop may reach one rank only, too. So each step has one all-reduce of a few numbers, and the host
reads the result once: the only time in a step that it waits for the device. Each batch of an evaluation has
such an all-reduce, too, since an evaluation may take longer than a job is given to end.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_mesh.runtime import device
from megatron_mesh.runtime.stopping import REASONS


@dataclass(frozen=True)
class Vote:
    """What one rank tells the others in a step."""

    stop: str = ""
    """Why to stop after this step (``stopping.REASONS``), or "" to continue."""
    written: bool = True
    """Whether this rank has finished its part of a background checkpoint; True if there is none."""


@dataclass(frozen=True)
class Outcome:
    """A step as all ranks see it."""

    loss: float
    """Per token, in nats; NaN if no token counts."""
    grad_norm: float
    """L2 norm of all gradients, before clipping."""
    taken: bool
    """Whether the weights were updated: loss and gradients were finite on all ranks."""
    stop: str
    """Why all ranks stop after this step (``stopping.REASONS``), or ""."""
    all_written: bool
    """Whether all ranks have finished their part of a background checkpoint."""


def agree(optimizer: MegatronOptimizer, totals: Tensor, vote: Vote) -> Outcome:
    """Combine what all ranks know of a step. Collective; waits for the device once.

    Args:
        optimizer: its gradients are ready (``prepare_grads``).
        totals: [2], this rank's sum of losses and number of tokens, from ``run_batch``.
    """
    stop, all_written, (loss, tokens, squares) = _count(vote, totals, squared_norm(optimizer))
    return Outcome(
        loss=loss / tokens if tokens else math.nan,
        grad_norm=math.sqrt(squares),
        taken=math.isfinite(squares) and math.isfinite(loss),
        stop=stop,
        all_written=all_written,
    )


@dataclass(frozen=True)
class Interim:
    """A batch of an evaluation as all ranks see it."""

    loss: float
    """Sum over the tokens of all ranks, in nats."""
    tokens: float
    stop: str
    """As in ``Outcome``, as is ``all_written``."""
    all_written: bool


def agree_in_evaluation(totals: Tensor, vote: Vote) -> Interim:
    """Combine what all ranks know of a batch of an evaluation. Collective; waits for the device once.

    Args:
        totals: as in ``agree``.
    """
    stop, all_written, (loss, tokens) = _count(vote, totals)
    return Interim(loss, tokens, stop, all_written)


def _count(vote: Vote, totals: Tensor, *more: Tensor) -> tuple[str, bool, list[float]]:
    """Why to stop, whether all have written, and the ranks' sums of ``totals`` [2] and ``more`` []."""
    # Everything is summed: unlike a maximum, a sum that includes NaN is NaN on every rank.
    numbers = 2 + len(more)
    ballot = torch.zeros(numbers + 1 + len(REASONS), dtype=torch.float64, device=device.device())
    # All ranks of a tensor-parallel group add the same totals. Their quotient is not affected.
    ballot[:2].copy_(totals)
    for index, number in enumerate(more):
        ballot[2 + index].copy_(number)
    # Only votes that are cast cost a kernel; fill_ takes its value along and needs no copy to the device.
    if not vote.written:
        ballot[numbers].fill_(1)
    if vote.stop:
        ballot[numbers + 1 + REASONS.index(vote.stop)].fill_(1)
    dist.all_reduce(ballot)
    counted = ballot.tolist()
    unwritten, *stops = counted[numbers:]
    wanted = [reason for reason, votes in zip(REASONS, stops, strict=True) if votes]
    return wanted[-1] if wanted else "", not unwritten, counted[:numbers]


def squared_norm(optimizer: MegatronOptimizer) -> Tensor:
    """This rank's share of the squared L2 norm of all gradients: [], float64, on the device.

    The sum over all ranks is the squared norm. Megatron-core's ``get_grad_norm`` computes the same norm, but
    with a collective and a wait of its own.
    """
    grads = [grad for part in _parts(optimizer) for grad in part.get_main_grads_for_grad_norm()]
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device.device())
    norm = torch.nn.utils.get_total_norm(grads).double()
    # Data-parallel replicas hold equal gradients, unless the optimizer is distributed.
    replicas = dist.get_world_size() / optimizer.get_grad_stats_parallel_group().size()
    return norm.square() / replicas


def clip(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Scale the gradients down to the norm ``clip_grad`` of the optimizer's settings (0: no limit)."""
    for part in _parts(optimizer):
        if part.config.clip_grad > 0 and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, grad_norm)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that Megatron-core chains, for example one for each kind of parameter."""
    return getattr(optimizer, "chained_optimizers", [optimizer])
