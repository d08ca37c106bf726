"""Compare our attention with Megatron-core's, and check what it stores for the backward."""

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_mesh.model import transformer_config
from megatron_mesh.model.layers import SDPAttention
from tests.helpers import relative_error, tiny_config

ARGUMENTS = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}


def attend(module: torch.nn.Module, seq: int, mask: torch.Tensor | None):
    generator = torch.Generator().manual_seed(1)
    qkv = [torch.randn(seq, 2, 4, 8, generator=generator, requires_grad=True) for _ in range(3)]
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = module(*qkv, mask)
    out.square().sum().backward()
    return out.detach(), [x.grad for x in qkv], sum(saved.values())


def test_equals_megatron_core() -> None:
    config = transformer_config(tiny_config("base"))
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    ours, our_grads, _ = attend(SDPAttention(config, **ARGUMENTS), 16, None)
    masked, masked_grads, _ = attend(SDPAttention(config, **ARGUMENTS), 16, mask)
    stock, stock_grads, _ = attend(DotProductAttention(config, **ARGUMENTS), 16, mask)
    for a, b, c in zip([ours, *our_grads], [masked, *masked_grads], [stock, *stock_grads], strict=True):
        assert relative_error(a, c) < 1e-6
        assert relative_error(b, c) < 1e-6


def test_memory_grows_with_the_sequence_not_its_square() -> None:
    config = transformer_config(tiny_config("base"))
    short, long = (attend(SDPAttention(config, **ARGUMENTS), seq, None)[2] for seq in (128, 256))
    assert long <= 2.05 * short
