"""A plain model's factor on its embedding, which stock GPT-NeoX has not: put into the weights, and out again.

A product does not tell what it was made of, once it is rounded. So the embedding is kept where the export
does not have it anyway, and is believed where its product has the very bits of the export's embedding:
whoever trains the export on changes those.
"""

from dataclasses import replace
from math import frexp
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.hf.weights import Weights, write_tensors
from megatron_mesh.recurrence import SCHEMES

FILE = "embedding_before_scaling.safetensors"
"""Beside the weights, and not read by transformers."""
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
    """Keep the embedding [vocabulary, H] in an export."""
    write_tensors({_NAME: embedding.contiguous()}, directory / FILE)


def taken_out(
    model: ModelConfig, ours: dict[str, Any], weights: Weights, name: str, head: str
) -> tuple[ModelConfig, Tensor | None]:
    """Settings and embedding of the model that an export was made of, if that was folded.

    Args:
        model: as the export reads.
        ours: settings of the training, as far as the export has them.
        name, head: of the export's embedding and output projection.

    Returns:
        ``model`` and None where the export is to be taken as it is.
    """
    trained = replace(
        model,
        scale_embeddings=bool(ours.get("scale_embeddings")),
        untie_embeddings_and_output_weights=bool(ours.get("untie_embeddings_and_output_weights")),
    )
    if not ours or not is_folded(trained):
        return model, None
    product = weights[name]
    kept = weights.directory / FILE
    if not trained.untie_embeddings_and_output_weights:
        embedding = weights[head]
    elif kept.is_file():
        embedding = load_file(kept)[_NAME]
    else:
        embedding = (product / factor(model)).to(product.dtype)
    if embedding.dtype != product.dtype or not torch.equal(embedding * factor(model), product):
        return model, None
    return trained, embedding
