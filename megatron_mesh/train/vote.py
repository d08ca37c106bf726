"""The agreement of all ranks in a step: loss, gradient norm, whether to update, whether to stop.

A loss or gradient that is not finite, even on one rank, would corrupt the weights for good. A signal to stop
may reach only one rank, too. So each step has one all-reduce of a few numbers, and the host reads the result:
this is the only time in a step that it waits for the device. Each batch of an evaluation has such an
all-reduce as well, because an evaluation may take longer than the time that a job is given to end.
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
    """One rank's contribution to the agreement."""

    stop: str = ""
    """Why to stop after this step (one of ``stopping.REASONS``), or "" to continue."""
    written: bool = True
    """Whether this rank has written its part of the background checkpoint. True if there is none."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step, equal on all ranks."""

    loss: float
    """Loss per token in nats. NaN if the batch has no token that counts."""
    grad_norm: float
    """L2 norm of all gradients before clipping."""
    taken: bool
    """Whether to update the weights: loss and gradients are finite on all ranks."""
    stop: str
    """Why all ranks stop after this step (one of ``stopping.REASONS``), or ""."""
    all_written: bool
    """Whether all ranks have written their parts of the background checkpoint."""


def agree(optimizer: MegatronOptimizer, totals: Tensor, vote: Vote) -> Outcome:
    """Combine the losses, gradient norms and votes of all ranks. Collective; waits for the device once.

    Args:
        optimizer: ``prepare_grads`` must have been called.
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
    """The outcome of one batch of an evaluation, equal on all ranks."""

    loss: float
    """Sum over the tokens of all ranks, in nats."""
    tokens: float
    stop: str
    """See ``Outcome``."""
    all_written: bool
    """See ``Outcome``."""


def agree_in_evaluation(totals: Tensor, vote: Vote) -> Interim:
    """Combine the losses and votes of all ranks. Collective; waits for the device once.

    Args:
        totals: see ``agree``.
    """
    stop, all_written, (loss, tokens) = _count(vote, totals)
    return Interim(loss, tokens, stop, all_written)


def _count(vote: Vote, totals: Tensor, *more: Tensor) -> tuple[str, bool, list[float]]:
    """Return why to stop, whether all ranks have written, and ``totals`` and ``more`` summed over ranks."""
    # A sum, because a sum that includes NaN is NaN on every rank. A maximum may lose it.
    numbers = 2 + len(more)
    ballot = torch.zeros(numbers + 1 + len(REASONS), dtype=torch.float64, device=device.device())
    # All ranks of a tensor-parallel group add the same totals, which cancels in the loss per token.
    ballot[:2].copy_(totals)
    for index, number in enumerate(more):
        ballot[2 + index].copy_(number)
    # Most steps have no such vote and launch no kernel. fill_ needs no copy from the host.
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
    """Return this rank's share of the squared L2 norm of all gradients: [], float64, on the device.

    The shares of all ranks sum to the squared norm. Megatron-core's ``get_grad_norm`` computes the same norm,
    but with an all-reduce and a wait of its own.
    """
    grads = [grad for part in _parts(optimizer) for grad in part.get_main_grads_for_grad_norm()]
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device.device())
    norm = torch.nn.utils.get_total_norm(grads).double()
    # Data-parallel replicas hold equal gradients, unless the optimizer is distributed.
    replicas = dist.get_world_size() / optimizer.get_grad_stats_parallel_group().size()
    return norm.square() / replicas


def clip(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Scale the gradients down to the norm ``clip_grad`` in the optimizer's settings (0: no clipping)."""
    for part in _parts(optimizer):
        if part.config.clip_grad > 0 and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, grad_norm)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the optimizers in Megatron-core's chain, or the optimizer itself if it is not a chain."""
    return getattr(optimizer, "chained_optimizers", [optimizer])
