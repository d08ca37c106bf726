"""What autograd keeps of a forward pass until its backward pass."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mesh.bench.variants import Variant
from megatron_mesh.data import Batch


@dataclass(frozen=True)
class Kept:
    """Memory that one micro-batch holds between forward and backward, without the parameters."""

    states: int
    """Tensors of the shape of the hidden state, [S, B, H]."""
    state_bytes: int
    """Their bytes."""
    total_bytes: int
    """Bytes of everything kept: states, attention, MLP, logits, the routers' weights."""


def kept_for_backward(variant: Variant, batch: Batch) -> Kept:
    """Count what a forward pass over ``batch`` keeps; a tensor saved twice counts once."""
    parameters = {p.untyped_storage().data_ptr() for p in variant.model.parameters()}
    shape = (batch.tokens.shape[1], batch.tokens.shape[0], variant.config.model.hidden_size)
    kept: dict[int, Tensor] = {}  # by the address of the memory
    states: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        address = x.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = x  # held, so that no address is used twice while we count
            if x.shape == shape:
                states[address] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = variant.losses(batch)
    assert losses.requires_grad
    return Kept(
        states=len(states),
        state_bytes=_bytes(states),
        total_bytes=_bytes(kept),
    )


def _bytes(tensors: dict[int, Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors.values())
