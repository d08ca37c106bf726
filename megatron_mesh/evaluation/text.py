"""Perplexity of a model on text of one's own, documents packed as in training."""

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
    """Documents in files, as ``tools/preprocess_data.py`` reads them."""

    paths: tuple[Path, ...]
    json_key: str
    data: str
    """SHA-256 over the files."""

    @property
    def label(self) -> str:
        """For people, and the key among the results."""
        return f"text {' '.join(path.name for path in self.paths)}"

    def documents(self) -> Iterator[str]:
        """All documents that are not empty. Raises UserError at a broken one."""
        for path in self.paths:
            for chunk in read_chunks(path, _CHUNK_BYTES):
                parsed = parse_chunk(chunk, [self.json_key], skip_broken=True)
                if parsed.broken:
                    raise UserError(f"{parsed.broken[0]}. Correct it.")
                yield from filter(None, parsed.texts[0])


def open_text(patterns: Sequence[str], json_key: str) -> Text:
    """The text in files and globs. Raises UserError as ``expand_inputs`` does."""
    try:
        paths = expand_inputs(list(patterns))
    except UserError as error:
        raise UserError(str(error).replace("--input", "--text", 1)) from None
    sha = hashlib.sha256(repr([json_key, *(digest(path) for path in paths)]).encode()).hexdigest()
    return Text(tuple(paths), json_key, sha)


def measure(
    text: Text,
    lm: Any,
    *,
    batch_size: int,
    limit: int | None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Perplexity of the documents, joined by end-of-text tokens and cut to the model's length.

    Args:
        text: what is read.
        lm: ``CheckedHFLM`` or ``CheckedVLLM``.
        batch_size: windows at a time.
        limit: only this many documents.
        on_batch: called with the tokens done and their total.

    The measures: ``token_perplexity`` = exp(nats / tokens), what the training's validation shows, with an
    end-of-text token after each document; ``word_perplexity`` and ``byte_perplexity`` divide the same nats
    by words (between white space, as lm-eval counts them) and UTF-8 bytes, ``bits_per_byte`` is the latter's
    logarithm. Every token is predicted once; the first sees an end-of-text token before it.

    Raises:
        UserError: there is no text, or the tokenizer has no end-of-text token.
    """
    start = time.monotonic()
    documents = list(islice(text.documents(), limit))
    if not documents:
        raise UserError(f"--text {' '.join(map(str, text.paths))}: no document with text in it")
    if lm.eot_token_id is None:
        raise UserError(
            "the tokenizer names no end-of-text token; add eos_token to its tokenizer_config.json"
        )
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
    """Ids of all documents, one end-of-text token before the first and one after each."""
    parts = [torch.tensor([end], dtype=torch.int32)]
    for begin in range(0, len(documents), 256):
        batch = tokenizer(
            list(documents[begin : begin + 256]),
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,  # no warning about documents that are longer than the model's length
        )
        parts += [torch.tensor([*ids, end], dtype=torch.int32) for ids in batch["input_ids"]]
    return torch.cat(parts)


def _negative_log_likelihood(
    lm: Any, ids: Tensor, batch_size: int, on_batch: Callable[[int, int], None]
) -> float:
    """Sum over all tokens but the first, in nats; windows as in training, the last one shorter."""
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
    except OverflowError:  # an untrained model, on text without spaces
        return math.inf
