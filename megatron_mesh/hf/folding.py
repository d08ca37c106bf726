"""Folds a plain model's embedding scale into its weights for export, and takes it out again.

Stock GPT-NeoX does not scale its embedding. A rounded product does not tell its factors, so the export keeps
the embedding in a file of its own, unless it has it anyway. On the way back, that file counts only if its
product equals the export's embedding bit for bit: the model may have been trained in between.
"""

from dataclasses import replace
from math import frexp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.hf.weights import TRAINING_ONLY, Weights, read_tensors, write_tensors
from megatron_mesh.recurrence import SCHEMES

FILE = TRAINING_ONLY / "embedding_before_scaling.safetensors"
_OLD_FILE = "embedding_before_scaling.safetensors"
"""Where earlier exports have it."""
_NAME = "embedding"


def is_folded(model: ModelConfig) -> bool:
    """Whether the export of a resolved model has the factor in its weights."""
    return model.scale_embeddings and not SCHEMES[model.recurrence].has_loop


def factor(model: ModelConfig) -> float:
    """What the embedding is multiplied by."""
    return model.hidden_size**0.5


def needs_file(model: ModelConfig) -> bool:
    """Whether the export has the embedding only as a product that was rounded.

    Products with a power of two are exact; tied weights are in the export as its output projection.
    """
    exact = frexp(factor(model))[0] == 0.5
    return is_folded(model) and model.untie_embeddings_and_output_weights and not exact


def write(embedding: Tensor, directory: Path) -> None:
    """Write the embedding [vocabulary, H] to an export's directory."""
    path = directory / FILE
    path.parent.mkdir(exist_ok=True)
    write_tensors({_NAME: embedding.contiguous()}, path)


def taken_out(
    model: ModelConfig, ours: dict[str, Any], weights: Weights, name: str, head: str
) -> tuple[ModelConfig, Tensor | None]:
    """Return settings and embedding of the model that was exported, if its scale was folded.

    Args:
        model: settings as the export states them.
        ours: the settings that were trained with, as far as the export has them.
        name, head: names of the export's embedding and output projection.

    Returns:
        ``model`` and None if the export is to be taken as it is.
    """
    trained = replace(
        model,
        scale_embeddings=bool(ours.get("scale_embeddings")),
        untie_embeddings_and_output_weights=bool(ours.get("untie_embeddings_and_output_weights")),
    )
    if not ours or not is_folded(trained) or head not in weights:
        return model, None
    product = weights[name]
    kept = _kept(weights.directory)
    if not trained.untie_embeddings_and_output_weights:
        embedding = weights[head]
    elif kept is not None:
        embedding = kept[: len(product)]  # without the padded rows that older exports have
    else:
        embedding = (product / factor(model)).to(product.dtype)
    if embedding.dtype != product.dtype or not torch.equal(embedding * factor(model), product):
        return model, None
    return trained, embedding


def _kept(directory: Path) -> Tensor | None:
    """Return the embedding that an export keeps in a file of its own, if it does."""
    for name in (FILE, _OLD_FILE):
        if (path := directory / name).is_file():
            return read_tensors(path).get(_NAME)
    return None
