"""Computes the perplexity of a model on the user's text, with documents packed as in training."""

import hashlib
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mesh.checkpoint.integrity import digest
from megatron_mesh.data.corpus import expand_inputs, parse_chunk, read_chunks
from megatron_mesh.errors import UserError
from megatron_mesh.evaluation.results import Result

_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Text:
    """Documents in files of the formats that ``tools/preprocess_data.py`` reads."""

    paths: tuple[Path, ...]
    json_key: str
    data: str
    """SHA-256 over the files."""

    @property
    def label(self) -> str:
        """The label of the result."""
        return f"text {' '.join(path.name for path in self.paths)}"

    def documents(self) -> Iterator[str]:
        """Yield all documents that aren't empty. Raise UserError for an invalid one."""
        for path in self.paths:
            for chunk in read_chunks(path, _CHUNK_BYTES):
                parsed = parse_chunk(chunk, [self.json_key], skip_broken=True)
                if parsed.broken:
                    raise UserError(f"{parsed.broken[0]}; correct this line")
                yield from filter(None, parsed.texts[0])


def open_text(patterns: Sequence[str], json_key: str) -> Text:
    """Find the text files that match ``patterns``. Raise UserError if ``expand_inputs`` does."""
    try:
        paths = expand_inputs(list(patterns))
    except UserError as error:
        raise UserError(str(error).replace("--input", "--text", 1)) from None
    sha = hashlib.sha256(repr([json_key, *(digest(path) for path in paths)]).encode()).hexdigest()
    return Text(tuple(paths), json_key, sha)


def measure_perplexity(
    text: Text,
    lm: Any,
    *,
    batch_size: int,
    limit: int | None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Compute the perplexity of the documents, joined by end-of-text tokens and split at the model's length.

    Each token is predicted once; the first one follows an end-of-text token. The metrics are:

    - ``token_perplexity``: exp(nats / tokens), where end-of-text tokens count. This is the perplexity that
      training reports for its validation data.
    - ``word_perplexity`` and ``byte_perplexity``: the same with the number of words (separated by whitespace,
      as in lm-eval) and of UTF-8 bytes.
    - ``bits_per_byte``: the logarithm of ``byte_perplexity`` to base 2.

    Args:
        text: the documents.
        lm: a ``CheckedHFLM`` or ``CheckedVLLM``.
        batch_size: number of windows at a time.
        limit: use only this many documents.
        on_batch: called with the number of finished tokens and their total.

    Raises:
        UserError: there is no text, or the tokenizer has no end-of-text token.
    """
    start = time.monotonic()
    documents = list(islice(text.documents(), limit))
    if not documents:
        raise UserError(f"--text {' '.join(map(str, text.paths))}: all documents are empty; give other files")
    if lm.eot_token_id is None:
        raise UserError("the tokenizer has no end-of-text token; add eos_token to its tokenizer_config.json")
    ids = _pack(documents, lm.tokenizer, lm.eot_token_id)
    nats = _negative_log_likelihood(lm, ids, batch_size, on_batch)
    words = sum(len(re.split(r"\s+", document)) for document in documents)
    size = sum(len(document.encode()) for document in documents)
    metrics = {
        "token_perplexity": _exp(nats / (len(ids) - 1)),
        "word_perplexity": _exp(nats / words),
        "byte_perplexity": _exp(nats / size),
        "bits_per_byte": nats / size / math.log(2),
        "tokens": len(ids) - 1,
        "window": lm.window,
    }
    return Result(text.label, None, text.data, metrics, {}, len(documents), time.monotonic() - start)


def _pack(documents: Sequence[str], tokenizer: Any, end: int) -> Tensor:
    """Return the ids of all documents, with an end-of-text token before the first and after each."""
    parts = [torch.tensor([end], dtype=torch.int32)]
    for begin in range(0, len(documents), 256):
        batch = tokenizer(
            list(documents[begin : begin + 256]),
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,  # don't warn about documents that are longer than the model's sequences
        )
        parts += [torch.tensor([*ids, end], dtype=torch.int32) for ids in batch["input_ids"]]
    return torch.cat(parts)


def _negative_log_likelihood(
    lm: Any, ids: Tensor, batch_size: int, on_batch: Callable[[int, int], None]
) -> float:
    """Return the sum over all tokens except the first, in nats. The last window may be shorter."""
    length, total = lm.window, len(ids) - 1
    windows = [ids[begin : begin + length + 1] for begin in range(0, total, length)]
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    if len(batches[-1]) > 1 and len(windows[-1]) < len(windows[0]):
        batches[-1:] = [windows[-len(batches[-1]) : -1], windows[-1:]]
    nats, done = 0.0, 0
    for batch in batches:
        tokens = torch.stack(batch)
        nats += lm.nats(tokens)
        done += tokens[:, 1:].numel()
        on_batch(done, total)
    return nats


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:  # e.g. word_perplexity of an untrained model on text without spaces
        return math.inf
