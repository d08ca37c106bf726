"""Folds a plain model's embedding scale into its exported embedding, and undoes this in a conversion back.

Stock GPT-NeoX doesn't scale its embedding. The factors of a rounded product cannot be recovered, so the
export stores the unscaled embedding in a separate file if it has no other copy of it. A conversion back uses
that file only if scaling it gives the export's embedding bit for bit: the export may have been trained since.
"""

from dataclasses import replace
from math import frexp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.hf.convert.weights import TRAINING_ONLY, ModelWeights, read_tensors, write_tensors
from megatron_mesh.recurrence import SCHEMES

EMBEDDING_FILE = TRAINING_ONLY / "embedding_before_scaling.safetensors"
_OLD_NAME = "embedding_before_scaling.safetensors"
"""Location of the file in early exports."""
_NAME = "embedding"


def is_folded(model: ModelConfig) -> bool:
    """Whether the scale is folded into the weights when this (resolved) model is exported."""
    return model.scale_embeddings and not SCHEMES[model.recurrence].has_loop


def factor(model: ModelConfig) -> float:
    """Return the embedding scale."""
    return model.hidden_size**0.5


def needs_file(model: ModelConfig) -> bool:
    """Whether the unscaled embedding cannot be recovered from the export's weights.

    It can be if the scale is a power of two, since such products are exact, or if the weights are tied, since
    then the output projection is a copy of it.
    """
    exact = frexp(factor(model))[0] == 0.5
    return is_folded(model) and model.untie_embeddings_and_output_weights and not exact


def write_unscaled(embedding: Tensor, directory: Path) -> None:
    """Write the unscaled embedding [vocabulary, H] to an export's directory."""
    path = directory / EMBEDDING_FILE
    path.parent.mkdir(exist_ok=True)
    write_tensors({_NAME: embedding.contiguous()}, path)


def unfold(
    model: ModelConfig, ours: dict[str, Any], weights: ModelWeights, name: str, head: str
) -> tuple[ModelConfig, Tensor | None]:
    """Return settings and unscaled embedding of the model before its scale was folded.

    Args:
        model: settings according to the export's config.json.
        ours: the settings of the training run, if the export has them.
        weights: the export's weights.
        name, head: names of the export's embedding and output projection.

    Returns:
        ``model`` and None if nothing was folded, or if the export was trained since.
    """
    trained = replace(
        model,
        scale_embeddings=bool(ours.get("scale_embeddings")),
        untie_embeddings_and_output_weights=bool(ours.get("untie_embeddings_and_output_weights")),
    )
    if not ours or not is_folded(trained) or head not in weights:
        return model, None
    product = weights[name]
    stored = _stored_embedding(weights.directory)
    if not trained.untie_embeddings_and_output_weights:
        embedding = weights[head]
    elif stored is not None:
        embedding = stored[: len(product)]  # early exports also store the padded rows
    else:
        embedding = (product / factor(model)).to(product.dtype)
    if embedding.dtype != product.dtype or not torch.equal(embedding * factor(model), product):
        return model, None
    return trained, embedding


def _stored_embedding(directory: Path) -> Tensor | None:
    """Return the unscaled embedding if the export has a file for it."""
    for name in (EMBEDDING_FILE, _OLD_NAME):
        if (path := directory / name).is_file():
            return read_tensors(path).get(_NAME)
    return None
