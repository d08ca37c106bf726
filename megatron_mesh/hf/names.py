"""Which tensor of a checkpoint is which tensor of an export. Names of exported tensors are a contract.

A checkpoint has one tensor per parameter of a part of the model, its layers stacked along a first dimension;
an export has one per layer. Contents are equal: the rows of query, key and value are interleaved per head
([heads, 3, head size]) in both. Only the rows of the vocabulary differ; see ``vocabulary.py``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_mesh.config.derived import layout, padded_vocab_size
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.hf import folding
from megatron_mesh.model.config import recurrence_options
from megatron_mesh.recurrence import SCHEMES, build_scheme

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
VOCABULARY = (EMBEDDING, OUTPUT)
"""Tensors with a row for each id."""
RECURRENCE = "decoder.recurrence."


@dataclass(frozen=True)
class Entry:
    """A tensor of an export, and where it is in a checkpoint."""

    name: str
    """In the export."""
    key: str
    """In the checkpoint."""
    shape: tuple[int, ...]
    layer: int | None = None
    """Index along the first dimension of the checkpoint's tensor; None: it is not stacked."""
    layers: int = 1
    """Length of that dimension."""
    factor: float = 1.0
    """By which the checkpoint's tensor is multiplied."""
    full_precision: bool = False
    """Whether it stays in float32 where the others are narrower (``Scheme.full_precision``)."""

    def dtype(self, others: torch.dtype) -> torch.dtype:
        """The type of the tensor in a model whose other weights are in ``others``."""
        return torch.promote_types(others, torch.float32) if self.full_precision else others


def entries(model: ModelConfig, rows: int | None = None) -> list[Entry]:
    """Every tensor of the export of a resolved model, in the order in which a token meets them.

    Args:
        model: its settings.
        rows: of the vocabulary in the export (default: as in the checkpoint).

    A model without a loop is exported as transformers' own GPT-NeoX, under the names of released checkpoints.
    That one does not scale its embedding: the factor goes into the weights, and tied weights become two.
    """
    looped = SCHEMES[model.recurrence].has_loop
    body, head = ("model", "lm_head") if looped else ("gpt_neox", "embed_out")
    vocabulary = (padded_vocab_size(model) if rows is None else rows, model.hidden_size)
    folded = folding.is_folded(model)
    factor = folding.factor(model) if folded else 1.0
    found = [Entry(f"{body}.embed_in.weight", EMBEDDING, vocabulary, factor=factor)]
    for ours, theirs, count in _sections(model):
        for index in range(count):
            for key, name, shape in _layer(model):
                place = f"decoder.{ours}layers.{key}"
                found.append(Entry(f"{body}.{theirs}.{index}.{name}", place, shape, index, count))
    if looped:
        found += _recurrence(model, body)
    for kind in ("weight", "bias"):
        name, key = f"{body}.final_layer_norm.{kind}", f"decoder.final_layernorm.{kind}"
        found.append(Entry(name, key, (model.hidden_size,)))
    if model.untie_embeddings_and_output_weights:
        found.append(Entry(f"{head}.weight", OUTPUT, vocabulary))
    elif folded:
        found.append(Entry(f"{head}.weight", EMBEDDING, vocabulary))
    return found


def _sections(model: ModelConfig) -> Iterator[tuple[str, str, int]]:
    """Prefix in the checkpoint, list in the export, and number of layers, of each part."""
    layers = layout(model)
    if not SCHEMES[model.recurrence].has_loop:
        yield "", "layers", layers.depth
        return
    yield "prelude.", "prelude", layers.prelude
    if layers.shared:
        yield "core.", "core", layers.core
    else:
        for loop in range(layers.loops):
            yield f"cores.{loop}.", f"cores.{loop}", layers.core
    yield "coda.", "coda", layers.coda


def _layer(model: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Key, name and shape of every parameter of one layer."""
    assert model.ffn_hidden_size is not None, "resolve() fills in ffn_hidden_size"
    h, ffn = model.hidden_size, model.ffn_hidden_size
    linears = {
        "self_attention.linear_qkv": ("attention.query_key_value", (3 * h, h)),
        "self_attention.linear_proj": ("attention.dense", (h, h)),
        "mlp.linear_fc1": ("mlp.dense_h_to_4h", (ffn, h)),
        "mlp.linear_fc2": ("mlp.dense_4h_to_h", (h, ffn)),
    }
    # Under the names that Transformer Engine's layers have, where a norm is part of the linear map after it.
    norms = {"self_attention.linear_qkv": "input_layernorm", "mlp.linear_fc1": "post_attention_layernorm"}
    for key, name in norms.items():
        yield f"{key}.layer_norm_weight", f"{name}.weight", (h,)
        yield f"{key}.layer_norm_bias", f"{name}.bias", (h,)
    for key, (name, shape) in linears.items():
        yield f"{key}.weight", f"{name}.weight", shape
        yield f"{key}.bias", f"{name}.bias", shape[:1]


def _recurrence(model: ModelConfig, body: str) -> list[Entry]:
    options = recurrence_options(model)
    scheme = build_scheme(model.recurrence, model.hidden_size, layout(model).loops, options)
    return [
        Entry(
            f"{body}.recurrence.{name}",
            f"{RECURRENCE}{name}",
            tuple(parameter.shape),
            full_precision=scheme.full_precision,
        )
        for name, parameter in scheme.named_parameters()
    ]
