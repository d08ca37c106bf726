"""Checks that a directory contains exactly the weights that its config.json describes."""

import re

import torch

from megatron_mesh.config.derived import layout
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert.tensors import entries
from megatron_mesh.hf.convert.weights import ModelWeights
from megatron_mesh.recurrence import SCHEMES

# Causal masks and rotary frequencies: old versions of transformers saved them, but no version reads them.
_BUFFERS = re.compile(r"(.*\.)?(attention\.(bias|masked_bias)|rotary_emb\.inv_freq)")


def check_weights(model: ModelConfig, weights: ModelWeights, rows: int) -> torch.dtype:
    """Check names, shapes and dtypes of all tensors. Return their dtype, or float32 if they have several.

    float32 represents the values of every accepted dtype exactly. Tensors that are always in float32 don't
    count.

    Args:
        model: settings of the model.
        weights: the weights in the directory.
        rows: size of the vocabulary in the directory, without padding.

    Raises:
        UserError: a tensor is missing, unexpected, quantized or of the wrong shape, or weights that should be
            tied differ.
    """
    where = weights.directory
    if (count := layout(model).unique_layers) > len(weights):  # the list below might not fit in memory
        raise UserError(
            f"{where} has {len(weights)} tensors, which is too few for the {count} layers in its "
            "config.json; download or export the model again"
        )
    _check_embedding(model, weights, rows)
    listed = entries(model, rows)
    for entry in listed:
        _check_tensor(weights, entry.name, entry.shape)
    names = {entry.name for entry in listed}
    head = _head(model)
    if not model.untie_embeddings_and_output_weights and head in weights:
        names.add(head)
        if not torch.equal(weights[head], weights[_embedding(model)]):
            raise UserError(
                f"{where}: config.json ties {head} to the embedding, but the two differ, and versions of "
                "transformers use different ones; save the model with tie_word_embeddings set to false"
            )
    unexpected = [name for name in weights.others(names) if not _BUFFERS.fullmatch(name)]
    if unexpected:
        raise UserError(
            f"{where} contains tensors that its config.json doesn't account for (number: {len(unexpected)}; "
            f"first: {unexpected[0]}); they may be further layers, an adapter, or part of another model; "
            "remove them or correct config.json"
        )
    always_float32 = {entry.name for entry in listed if entry.full_precision}
    dtypes = {weights.dtype(name) for name in names - always_float32}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _check_embedding(model: ModelConfig, weights: ModelWeights, rows: int) -> None:
    """Check the hidden size and the vocabulary first: ``entries`` allocates routers of this hidden size."""
    _check_tensor(weights, _embedding(model), (rows, model.hidden_size))


def _check_tensor(weights: ModelWeights, name: str, shape: tuple[int, ...]) -> None:
    if name not in weights:
        raise UserError(
            f"{weights.directory} lacks the tensor {name}, which its config.json calls for; download or "
            "export the model again"
        )
    if (found := weights.shape(name)) != shape:
        raise UserError(
            f"{weights.directory}: {name} has the shape {list(found)}, but config.json calls for "
            f"{list(shape)}; download or export the model again"
        )


def _embedding(model: ModelConfig) -> str:
    return "model.embed_in.weight" if SCHEMES[model.recurrence].has_loop else "gpt_neox.embed_in.weight"


def _head(model: ModelConfig) -> str:
    return "lm_head.weight" if SCHEMES[model.recurrence].has_loop else "embed_out.weight"
