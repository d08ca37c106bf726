"""Vocabulary rows of an export: exactly one for each id of the tokenizer.

Training pads the vocabulary. Padded rows have no meaning, but each has a logit, so sampling could choose
them. An export therefore omits them, but stores them in a separate file that no engine loads, so that a
conversion back restores them bit for bit.

A new row, for a padding token that the vocabulary lacks or for padding, is the mean of the other rows. The
exponential of a mean logit is at most the mean of the exponentials, so next to V other rows the new row's
probability is at most 1 / V. An untrained row or a row of zeros has no such bound, since all other logits may
be far below 0.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mesh.config.derived import padded_vocab_size
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.hf.convert.tensors import EMBEDDING
from megatron_mesh.hf.convert.weights import TRAINING_ONLY, read_tensors, write_tensors

PADDING_FILE = TRAINING_ONLY / "vocabulary_padding.safetensors"


def to_export(weight: Tensor, trained: int, rows: int) -> Tensor:
    """Return [``rows``, H]: the first ``trained`` rows of [padded vocabulary, H], followed by new ones."""
    return _with_mean_rows(weight[:trained], rows)


def write_omitted_rows(weights: dict[str, Tensor], directory: Path) -> None:
    """Store the rows [*, H] that an export omits, by the names of the checkpoint's tensors."""
    if omitted := {name: weight.contiguous() for name, weight in weights.items() if len(weight)}:
        (directory / PADDING_FILE).parent.mkdir(exist_ok=True)
        write_tensors(omitted, directory / PADDING_FILE)


def read_omitted_rows(
    config: dict[str, Any], trained: ModelConfig, directory: Path
) -> dict[str, Tensor] | None:
    """Return the rows [*, H] that an export omits, by the names of the checkpoint's tensors.

    Return None if the vocabulary was resized after the export. Then each of its rows has a meaning, and the
    stored rows no longer belong to it.

    Args:
        config: contents of config.json.
        trained: settings that the model was trained with.
        directory: the export.
    """
    if trained.vocab_size is None:
        return None
    omitted = read_tensors(directory / PADDING_FILE) if (directory / PADDING_FILE).is_file() else {}
    rows = config["vocab_size"]
    old_rows = padded_vocab_size(trained) - len(omitted.get(EMBEDDING, ()))
    has_new_padding_token = rows == old_rows + 1 and config.get("pad_token_id") == old_rows
    return omitted if has_new_padding_token or (omitted and rows == old_rows) else None


def from_export(weight: Tensor, rows: int, omitted: Tensor | None) -> Tensor:
    """Return [``rows``, H]: the rows of an export, followed by those that it omits, or by new ones."""
    if omitted is None or omitted.shape[1:] != weight.shape[1:]:
        return _with_mean_rows(weight[:rows], rows)
    return torch.cat([weight[: rows - len(omitted)], omitted.to(weight.dtype)])


def _with_mean_rows(weight: Tensor, rows: int) -> Tensor:
    missing = rows - len(weight)
    if missing <= 0:
        return weight
    mean = weight.mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(missing, -1)])
