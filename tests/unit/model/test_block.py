"""Test the block: checkpoint keys, activations stored for backward, and rejected settings."""

import pytest
import torch
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_mesh.errors import UserError
from megatron_mesh.model import MeshTransformerConfig, build_model, transformer_config
from megatron_mesh.recurrence import SCHEMES
from tests.helpers import tiny_config

SEQ, BATCH, HIDDEN = 16, 2, 32


def keys(scheme: str) -> set[str]:
    state = build_model(tiny_config(scheme, "1+2R2+1")).sharded_state_dict()
    return {entry.key for name, entry in state.items() if "_extra_state" not in name}


def test_checkpoint_keys_are_a_contract() -> None:
    layer = {
        f"{module}.{kind}"
        for module in (
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "mlp.linear_fc1",
            "mlp.linear_fc2",
        )
        for kind in ("weight", "bias")
    } | {
        f"{module}.layer_norm_{kind}"
        for module in ("self_attention.linear_qkv", "mlp.linear_fc1")
        for kind in ("weight", "bias")
    }
    outside = {
        "embedding.word_embeddings.weight",
        "output_layer.weight",
        "decoder.final_layernorm.weight",
        "decoder.final_layernorm.bias",
    }
    routers = {
        f"decoder.recurrence.{kind}.{t}.{name}"
        for kind in ("write", "read")
        for t in range(3)
        for name in ("weight", "bias")
    }

    def sections(*names: str) -> set[str]:
        return {f"decoder.{section}layers.{name}" for section in names for name in layer}

    assert keys("vanilla") == outside | sections("")
    assert keys("base") == outside | sections("prelude.", "core.", "coda.")
    assert keys("mesh") == outside | sections("prelude.", "core.", "coda.") | routers
    assert keys("vanilla+mesh") == (outside | sections("prelude.", "cores.0.", "cores.1.", "coda.") | routers)


def test_is_a_megatron_block_and_lists_each_layer_once() -> None:
    decoder = build_model(tiny_config("mesh", "1+2R3+1")).decoder
    assert isinstance(decoder, TransformerBlock)
    assert len(decoder.layers) == len(set(decoder.layers)) == 4
    assert len(decoder.passes) == 5
    assert decoder.passes[1] is decoder.passes[2] is decoder.passes[3]


def saved_states(**settings) -> int:
    """Count the states [S, B, H] that autograd saves for one micro-batch, each storage once."""
    model = build_model(tiny_config(**settings))
    storages: set[int] = set()
    alive = []  # holds the tensors, so that no address is reused while we count

    def pack(x: torch.Tensor) -> torch.Tensor:
        alive.append(x)
        if x.shape == (SEQ, BATCH, HIDDEN) and not isinstance(x, torch.nn.Parameter):
            storages.add(x.untyped_storage().data_ptr())
        return x

    tokens = torch.zeros(BATCH, SEQ, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(tokens, None, None)
    return len(storages)


@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("recompute", [None, "full"])
def test_mesh_stores_k_plus_2_states(loops: int, recompute: str | None) -> None:
    """The stored states are h_emb and o_0..o_K, for any number of slots.

    The base scheme stores h_emb too, because its first layer reads it. So the difference is K + 1.
    """
    layers = f"1+1R{loops}+1"
    base = saved_states(recurrence="base", layers=layers, recompute_granularity=recompute)
    mesh = saved_states(recurrence="mesh", layers=layers, recompute_granularity=recompute)
    assert mesh - base == loops + 1
    more_slots = saved_states(recurrence="mesh", layers=layers, recompute_granularity=recompute, mesh_slots=9)
    assert more_slots == mesh


def test_offloading_is_refused() -> None:
    plain = vars(transformer_config(tiny_config("mesh")))
    fields = {name: plain[name] for name in MeshTransformerConfig.__dataclass_fields__ if name in plain}
    with pytest.raises(UserError, match="activation offloading requires that each layer runs once"):
        MeshTransformerConfig(**{**fields, "cpu_offloading": True, "cpu_offloading_num_layers": 1})


def test_every_scheme_has_a_formula() -> None:
    assert all(scheme.formula and scheme.__doc__ for scheme in SCHEMES.values())
