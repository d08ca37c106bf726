#!/usr/bin/env python
"""Train a SentencePiece tokenizer that keeps white space, on a JSONL corpus.

    python examples/quickstart/train_tokenizer.py --input runs/quickstart/corpus/train.jsonl \\
        --output-prefix runs/quickstart/tokenizer/tokenizer --vocab-size 4096

Writes PREFIX.model and PREFIX.vocab. Decoding restores the text exactly: nothing is normalized, and
characters outside the vocabulary are encoded as bytes. The one exception is the character U+2581, which is
SentencePiece's sign for a space and is decoded as one.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_mesh import command
from megatron_mesh.errors import UserError


@dataclass
class Options:
    """Options of the tokenizer."""

    input: Path
    """JSONL file with the text of each document under "text"."""
    output_prefix: str
    """Path of the tokenizer without its .model."""
    vocab_size: int = 4096
    """Number of pieces, 256 bytes included."""
    sample_megabytes: float = 8.0
    """Amount of text to train on, in MB."""


def main(options: Options) -> None:
    """Train the tokenizer and write it."""
    model, corpus = Path(f"{options.output_prefix}.model"), options.input
    if model.exists():
        raise UserError(f"{model} already exists; delete it, or choose another --output-prefix")
    if not corpus.is_file():
        raise UserError(f"--input {corpus} does not exist; build_corpus.py writes such a file")
    model.parent.mkdir(parents=True, exist_ok=True)
    partial = model.with_suffix(".partial")
    lines = sample_lines(corpus, round(options.sample_megabytes * 1e6))
    train(lines, partial, options.vocab_size)
    for suffix in (".vocab", ".model"):
        os.replace(f"{partial}{suffix}", model.with_suffix(suffix))
    print(f"{model}: {options.vocab_size:,} pieces")


def sample_lines(corpus: Path, size: int) -> Iterator[str]:
    """Yield the lines of the first documents of the corpus: about ``size`` bytes, at least one document."""
    with corpus.open(encoding="utf-8") as file:
        for document in file:
            yield from json.loads(document)["text"].splitlines(keepends=True)
            size -= len(document.encode())
            if size <= 0:
                return


def train(lines: Iterator[str], prefix: Path, vocab_size: int) -> None:
    """Train BPE on ``lines`` and write ``prefix``.model and ``prefix``.vocab.

    Raises:
        UserError: the lines have too few different pieces for ``vocab_size``.
    """
    import sentencepiece

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_prefix=str(prefix),
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # so that an indentation can be one piece
            user_defined_symbols=["\n"],
            split_digits=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"the tokenizer cannot be trained: {error}; lower --vocab-size, or give more text"
        ) from None


if __name__ == "__main__":
    command.run(main)
