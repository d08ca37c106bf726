"""Rows of the vocabulary in an export: one for each id of the tokenizer, so that no engine can draw another.

Training pads the vocabulary. Padded rows have no meaning, but each has a logit, so sampling could draw
them. The export keeps them in a file that no engine loads, for the way back.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mesh.config.derived import padded_vocab_size
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.hf.names import EMBEDDING
from megatron_mesh.hf.weights import read_tensors, write_tensors

FILE = Path("megatron_mesh/vocabulary_padding.safetensors")
"""In an export, below its top directory: some engines load every safetensors file there."""


def to_export(weight: Tensor, rows: int) -> Tensor:
    """[padded vocabulary, H] -> [``rows``, H]. A new row, for a padding token, is the mean of the others."""
    return _with_mean_rows(weight[:rows], rows)


def keep(weights: dict[str, Tensor], directory: Path) -> None:
    """Keep the rows [*, H] that an export leaves out, by the names of the checkpoint's tensors."""
    if kept := {name: weight.contiguous() for name, weight in weights.items() if len(weight)}:
        (directory / FILE).parent.mkdir(exist_ok=True)
        write_tensors(kept, directory / FILE)


def is_of_training(config: dict[str, Any], trained: ModelConfig, directory: Path) -> bool:
    """Whether an export still has the vocabulary of the training, ``trained``, and can come back as it was.

    The rows that it left out are there for that, or it has one more, for a new padding token. Any other size
    was chosen since then, and each of its rows means something.

    Args:
        config: contents of config.json.
        trained: our own settings in it.
        directory: the export's.
    """
    if trained.vocab_size is None:
        return False
    rows, padded = config["vocab_size"], padded_vocab_size(trained)
    left_out = _kept(directory).get(EMBEDDING)
    if left_out is not None:
        return rows + len(left_out) == padded
    return rows == padded + 1 and config.get("pad_token_id") == padded


def from_export(weight: Tensor, key: str, rows: int, directory: Path) -> Tensor:
    """[vocabulary, H] -> [``rows``, H], the checkpoint's tensor ``key``.

    Rows that the export left out come from the file that keeps them. Without it, as after training with
    transformers, they become the mean of the others. The loss leaves those out. Other code that counts them
    finds a small share: the exponential of the mean logit is at most the mean of the exponentials, so k rows
    beside V change a loss by at most log(1 + k / V). Zeros have no such bound, since all logits may be far
    below 0.
    """
    if len(weight) < rows:
        kept = _kept(directory).get(key)
        if kept is not None and (len(kept) + len(weight), *kept.shape[1:]) == (rows, *weight.shape[1:]):
            return torch.cat([weight, kept.to(weight.dtype)])
    return _with_mean_rows(weight[:rows], rows)


def _kept(directory: Path) -> dict[str, Tensor]:
    path = directory / FILE
    return read_tensors(path) if path.is_file() else {}


def _with_mean_rows(weight: Tensor, rows: int) -> Tensor:
    missing = rows - len(weight)
    if missing <= 0:
        return weight
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(missing, -1)])
