"""Floating-point operations of the unrolled network, by the usual count: 2 per multiply-add of a matmul."""

from megatron_mesh.config.derived import layout, padded_vocab_size
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.recurrence import SCHEMES


def forward_flops_per_token(model: ModelConfig) -> float:
    """FLOPs of one forward pass per token, averaged over a sequence of ``seq_length``.

    Causal attention counts the half of the scores that is needed (as Megatron-LM's
    ``num_floating_point_operations`` does); recomputation does not count.
    """
    h, s = model.hidden_size, model.seq_length
    ffn = model.ffn_hidden_size or 4 * h
    per_layer: float = 2 * h * (3 * h) + 2 * h * h + 2 * 2 * h * ffn  # qkv, output projection, MLP
    per_layer += 2 * 2 * s * h / 2  # scores and weighted values, causal
    total = layout(model).depth * per_layer
    total += SCHEMES[model.recurrence].forward_flops(h, layout(model).loops, model.mesh_slots or 0)
    return total + 2 * h * padded_vocab_size(model)


def flops_per_token(model: ModelConfig) -> float:
    """FLOPs of forward and backward per token: the backward is twice the forward."""
    return 3 * forward_flops_per_token(model)
