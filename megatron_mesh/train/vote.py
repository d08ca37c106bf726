"""What all ranks agree on in a step: loss, gradient norm, whether to update, when to stop.

A loss or gradient that is not finite would spoil the weights for good, even if it occurs on one rank only. A
signal to stop may reach one rank only, too. So each step has one all-reduce of a few numbers, and the host
reads the result once: the only time in a step that it waits for the device.
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
    # Everything is summed: unlike a maximum, a sum that includes NaN is NaN on every rank.
    ballot = torch.zeros(4 + len(REASONS), dtype=torch.float64, device=device.device())
    ballot[0].copy_(squared_norm(optimizer))
    # All ranks of a tensor-parallel group add the same totals. Their quotient is not affected.
    ballot[1:3].copy_(totals)
    # Only votes that are cast cost a kernel; fill_ takes its value along and needs no copy to the device.
    if not vote.written:
        ballot[3].fill_(1)
    if vote.stop:
        ballot[4 + REASONS.index(vote.stop)].fill_(1)
    dist.all_reduce(ballot)
    squares, loss, tokens, unwritten, *stops = ballot.tolist()
    wanted = [reason for reason, votes in zip(REASONS, stops, strict=True) if votes]
    return Outcome(
        loss=loss / tokens if tokens else math.nan,
        grad_norm=math.sqrt(squares),
        taken=math.isfinite(squares) and math.isfinite(loss),
        stop=wanted[-1] if wanted else "",
        all_written=not unwritten,
    )


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
