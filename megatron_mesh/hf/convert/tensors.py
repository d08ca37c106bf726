"""Maps tensor names of a checkpoint to those of an export, which must never change.

A checkpoint stacks the layers of a part (prelude, core or coda) along the first dimension of one tensor for
each parameter; an export has one tensor for each layer. The contents are equal: both interleave the rows of
query, key and value per head ([heads, 3, head size]). Only the vocabulary rows differ; see ``vocabulary.py``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_mesh.config.derived import layout, padded_vocab_size
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.hf import folding
from megatron_mesh.model.transformer_config import recurrence_options
from megatron_mesh.recurrence import SCHEMES, build_scheme

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
VOCABULARY = (EMBEDDING, OUTPUT)
"""Names of the tensors that have one row for each id."""
RECURRENCE = "decoder.recurrence."


@dataclass(frozen=True)
class ExportTensor:
    """A tensor of an export, and its location in a checkpoint."""

    name: str
    """Name in the export."""
    key: str
    """Name in the checkpoint."""
    shape: tuple[int, ...]
    """Shape in the export."""
    layer: int | None = None
    """Index along the first dimension of the checkpoint's tensor; None if it isn't stacked."""
    layers: int = 1
    """Size of that dimension."""
    factor: float = 1.0
    """Factor by which an export multiplies the checkpoint's tensor."""
    full_precision: bool = False
    """Whether the tensor is float32 even in a model of lower precision (``Scheme.full_precision``)."""

    def dtype(self, others: torch.dtype) -> torch.dtype:
        """Return the dtype of the tensor in a model whose other weights have the dtype ``others``."""
        return torch.promote_types(others, torch.float32) if self.full_precision else others


def entries(model: ModelConfig, rows: int | None = None) -> list[ExportTensor]:
    """List the tensors of a model's export, in the order of computation.

    A model without a loop becomes transformers' own GPT-NeoX, with the tensor names of released checkpoints.
    GPT-NeoX doesn't scale its embedding, so the scale is folded into the weights, which unties tied weights.

    Args:
        model: resolved settings of the model.
        rows: size of the vocabulary in the export (default: as in the checkpoint).
    """
    looped = SCHEMES[model.recurrence].has_loop
    body, head = ("model", "lm_head") if looped else ("gpt_neox", "embed_out")
    vocabulary = (padded_vocab_size(model) if rows is None else rows, model.hidden_size)
    folded = folding.is_folded(model)
    factor = folding.factor(model) if folded else 1.0
    found = [ExportTensor(f"{body}.embed_in.weight", EMBEDDING, vocabulary, factor=factor)]
    for ours, theirs, count in _parts(model):
        for index in range(count):
            for key, name, shape in _layer(model):
                full_key = f"decoder.{ours}layers.{key}"
                found.append(ExportTensor(f"{body}.{theirs}.{index}.{name}", full_key, shape, index, count))
    if looped:
        found += _recurrence(model, body)
    for kind in ("weight", "bias"):
        name, key = f"{body}.final_layer_norm.{kind}", f"decoder.final_layernorm.{kind}"
        found.append(ExportTensor(name, key, (model.hidden_size,)))
    if model.untie_embeddings_and_output_weights:
        found.append(ExportTensor(f"{head}.weight", OUTPUT, vocabulary))
    elif folded:
        found.append(ExportTensor(f"{head}.weight", EMBEDDING, vocabulary))
    return found


def _parts(model: ModelConfig) -> Iterator[tuple[str, str, int]]:
    """Yield prefix in the checkpoint, name in the export, and number of layers of each part."""
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
    """Yield name in the checkpoint, name in the export, and shape of each parameter of a layer."""
    assert model.ffn_hidden_size is not None, "resolve() fills in ffn_hidden_size"
    h, ffn = model.hidden_size, model.ffn_hidden_size
    linears = {
        "self_attention.linear_qkv": ("attention.query_key_value", (3 * h, h)),
        "self_attention.linear_proj": ("attention.dense", (h, h)),
        "mlp.linear_fc1": ("mlp.dense_h_to_4h", (ffn, h)),
        "mlp.linear_fc2": ("mlp.dense_4h_to_h", (h, ffn)),
    }
    # The checkpoint uses the names of Transformer Engine, which fuses a norm with the linear layer after it.
    norms = {"self_attention.linear_qkv": "input_layernorm", "mlp.linear_fc1": "post_attention_layernorm"}
    for key, name in norms.items():
        yield f"{key}.layer_norm_weight", f"{name}.weight", (h,)
        yield f"{key}.layer_norm_bias", f"{name}.bias", (h,)
    for key, (name, shape) in linears.items():
        yield f"{key}.weight", f"{name}.weight", shape
        yield f"{key}.bias", f"{name}.bias", shape[:1]


def _recurrence(model: ModelConfig, body: str) -> list[ExportTensor]:
    options = recurrence_options(model)
    scheme = build_scheme(model.recurrence, model.hidden_size, layout(model).loops, options)
    return [
        ExportTensor(
            f"{body}.recurrence.{name}",
            f"{RECURRENCE}{name}",
            tuple(parameter.shape),
            full_precision=scheme.full_precision,
        )
        for name, parameter in scheme.named_parameters()
    ]
