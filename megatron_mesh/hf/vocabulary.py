"""Rows of the vocabulary in an export: one for each id of the tokenizer, so that no engine can draw another.

Training pads the vocabulary. Padded rows have no meaning, but each has a logit, so sampling could draw
them. The export keeps them in a file that no engine loads, for the way back.

A row that is new, because the vocabulary has none for the padding token or has to be padded, is the mean of
the others. The exponential of the mean logit is at most the mean of the exponentials, so the new row's
probability is at most 1 / V beside V others. An untrained row, or zeros, has no such bound: all other logits
may be far below 0.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mesh.config.derived import padded_vocab_size
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.hf.names import EMBEDDING
from megatron_mesh.hf.weights import TRAINING_ONLY, read_tensors, write_tensors

FILE = TRAINING_ONLY / "vocabulary_padding.safetensors"


def to_export(weight: Tensor, trained: int, rows: int) -> Tensor:
    """Return [``rows``, H]: the first ``trained`` rows of [padded vocabulary, H], then new ones."""
    return _with_mean_rows(weight[:trained], rows)


def keep(weights: dict[str, Tensor], directory: Path) -> None:
    """Keep the rows [*, H] that an export leaves out, by the names of the checkpoint's tensors."""
    if kept := {name: weight.contiguous() for name, weight in weights.items() if len(weight)}:
        (directory / FILE).parent.mkdir(exist_ok=True)
        write_tensors(kept, directory / FILE)


def left_out(config: dict[str, Any], trained: ModelConfig, directory: Path) -> dict[str, Tensor] | None:
    """Return the rows [*, H] that an export left out, by the names of the checkpoint's tensors.

    None if the export no longer has the vocabulary of the training: any other size was chosen since then, and
    each of its rows means something.

    Args:
        config: contents of config.json.
        trained: settings of the training.
        directory: the export's.
    """
    if trained.vocab_size is None:
        return None
    kept = read_tensors(directory / FILE) if (directory / FILE).is_file() else {}
    rows = config["vocab_size"]
    old_rows = padded_vocab_size(trained) - len(kept.get(EMBEDDING, ()))
    has_new_padding = rows == old_rows + 1 and config.get("pad_token_id") == old_rows
    return kept if has_new_padding or (kept and rows == old_rows) else None


def from_export(weight: Tensor, rows: int, kept: Tensor | None) -> Tensor:
    """Return [``rows``, H]: the rows of an export, then those that it left out, or else new ones."""
    if kept is None or kept.shape[1:] != weight.shape[1:]:
        return _with_mean_rows(weight[:rows], rows)
    return torch.cat([weight[: rows - len(kept)], kept.to(weight.dtype)])


def _with_mean_rows(weight: Tensor, rows: int) -> Tensor:
    missing = rows - len(weight)
    if missing <= 0:
        return weight
    mean = weight.mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(missing, -1)])
