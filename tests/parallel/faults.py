"""Deliberate faults, to verify that the comparison with one process notices them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_mesh.parallel import Stage
from megatron_mesh.recurrence import LoopState, MeSH
from megatron_mesh.recurrence.memory import Mix, factored_cycle


@contextmanager
def early_reduction(stage: Stage) -> Iterator[None]:
    """Reduce the shared core too early: after the backward of its last loop, which runs first."""
    starts = stage.config.grad_sync_func
    prelude, core, *rest, coda = starts
    assert len(rest) == 1
    stage.config.grad_sync_func = [prelude, rest[0], core, coda]
    yield


@contextmanager
def unsummed_routers(stage: Stage) -> Iterator[None]:
    """Don't sum router gradients: each tensor-parallel rank keeps those of its own sequence shard."""
    for module in stage.modules:
        for parameter in module.parameters():
            parameter.sum_over_tensor_parallel = False
    yield


def _read_first(o: Tensor, w: Tensor, r: Tensor, state: LoopState, mix: Mix) -> Tensor:
    read = mix(r[..., :1], [state.kept["h_emb"]])
    if state.outputs:
        gains = [r[..., 0], *((r * w_j).sum(-1) for w_j in state.writes)]
        read = mix(torch.stack(gains, dim=-1), [state.kept["h_emb"], *state.outputs])
    return factored_cycle(o, w, r, state, mix) * 0 + read


@contextmanager
def read_before_write(stage: Stage) -> Iterator[None]:
    """Read the memory as it was before the cycle's own write."""
    if isinstance(stage.recurrence, MeSH):
        stage.recurrence.run_cycle = _read_first
    yield


@contextmanager
def lost_leaf_gradient(stage: Stage) -> Iterator[None]:
    """Drop the gradient that later passes send to the pass that computed a state."""
    from megatron_mesh.parallel import ring

    original = ring._AddLeafGradient.backward
    ring._AddLeafGradient.backward = staticmethod(lambda ctx, grad: (grad, None))  # type: ignore[method-assign]
    try:
        yield
    finally:
        ring._AddLeafGradient.backward = original  # type: ignore[method-assign]
