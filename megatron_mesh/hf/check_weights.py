"""Checks that a directory holds exactly the weights that its config.json asks for."""

import re

import torch

from megatron_mesh.config.derived import layout
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.errors import UserError
from megatron_mesh.hf.names import entries
from megatron_mesh.hf.weights import Weights
from megatron_mesh.recurrence import SCHEMES

# The causal mask and the rotary frequencies, which old versions of transformers saved and none reads.
_BUFFERS = re.compile(r"(.*\.)?(attention\.(bias|masked_bias)|rotary_emb\.inv_freq)")


def check_weights(model: ModelConfig, weights: Weights, rows: int) -> torch.dtype:
    """Check names, shapes and dtypes of all tensors. Return their dtype, or float32 if they have several.

    Tensors that stay in float32 in any model don't count.
    float32 holds the values of every dtype that is taken exactly.

    Args:
        model: settings of the model.
        weights: of the directory.
        rows: of the vocabulary in the directory; it is not padded there.

    Raises:
        UserError: a tensor is missing, left over, quantized or of another shape, or the weights of a tied
            model are not tied.
    """
    where = weights.directory
    if (count := layout(model).unique_layers) > len(weights):  # the list below might not fit in memory
        raise UserError(
            f"{where} holds {len(weights)} tensors, too few for the {count} layers in its config.json; "
            "download or export the model again"
        )
    _check_embedding(model, weights, rows)
    listed = entries(model, rows)
    for entry in listed:
        if entry.name not in weights:
            raise UserError(f"{where} lacks the tensor {entry.name}, which its config.json asks for")
        if (shape := weights.shape(entry.name)) != entry.shape:
            raise UserError(
                f"{where}: {entry.name} is {list(shape)}, and by config.json should be {list(entry.shape)}"
            )
    names = {entry.name for entry in listed}
    head = _head(model)
    if not model.untie_embeddings_and_output_weights and head in weights:
        names.add(head)
        if not torch.equal(weights[head], weights[_embedding(model)]):
            raise UserError(
                f"{where}: config.json ties {head} to the embedding, and the two differ; versions of "
                "transformers disagree on which counts, so it cannot be converted"
            )
    left = [name for name in weights.others(names) if not _BUFFERS.fullmatch(name)]
    if left:
        raise UserError(
            f"{where} holds {left[0]}, which its config.json does not ask for (number of such tensors: "
            f"{len(left)}); they may be more layers, an adapter, or another model's; it cannot be converted"
        )
    apart = {entry.name for entry in listed if entry.full_precision}
    dtypes = {weights.dtype(name) for name in names - apart}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _check_embedding(model: ModelConfig, weights: Weights, rows: int) -> None:
    """Check the largest sizes first: nothing of a wrong size may be allocated."""
    name = _embedding(model)
    if name not in weights:
        raise UserError(f"{weights.directory} lacks the tensor {name}, which its config.json asks for")
    wanted = [rows, model.hidden_size]
    if (shape := list(weights.shape(name))) != wanted:
        raise UserError(f"{weights.directory}: {name} is {shape}, and by config.json should be {wanted}")


def _embedding(model: ModelConfig) -> str:
    return "model.embed_in.weight" if SCHEMES[model.recurrence].has_loop else "gpt_neox.embed_in.weight"


def _head(model: ModelConfig) -> str:
    return "lm_head.weight" if SCHEMES[model.recurrence].has_loop else "embed_out.weight"
