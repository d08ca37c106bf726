"""Steps that must not be taken: a loss or gradients that are not finite would spoil the weights for good."""

import math

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_mesh.checkpoint.state import TrainState
from megatron_mesh.runtime.logging import Log
from megatron_mesh.runtime.stopping import StopRequests
from megatron_mesh.train.step import loss_per_token


def guarded_step(
    optimizer: MegatronOptimizer, totals: Tensor, stop: StopRequests, step: int
) -> tuple[float, bool, str]:
    """Clip the gradients and update the weights, unless loss or gradients are not finite.

    A collective operation; all ranks do the same.

    Args:
        totals: this rank's losses, from ``run_batch``.

    Returns:
        The norm of the gradients, whether the weights were updated, and why to stop after this step ("").
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    finite = math.isfinite(norm) and bool(torch.isfinite(totals).all())
    reason, faulty = stop.agreed(step, faulty=not finite)
    if not faulty:
        optimizer.step()
    return norm, not faulty, reason


def record_skipped(log: Log, state: TrainState, totals: Tensor, grad_norm: float, batch_size: int) -> None:
    """Count a step that was not taken, and log which samples it held; before ``state`` advances."""
    state.skipped += 1
    first = state.consumed_samples
    samples = {"first_sample": first, "last_sample": first + batch_size - 1}
    log.record("skipped", state.step + 1, loss=loss_per_token(totals), grad_norm=grad_norm, **samples)
