#!/usr/bin/env python
"""A SentencePiece tokenizer from a JSONL corpus, for text in which white space matters.

python examples/quickstart/train_tokenizer.py --input runs/quickstart/corpus/train.jsonl \\
    --output-prefix runs/quickstart/tokenizer/tokenizer --vocab-size 4096

writes PREFIX.model and PREFIX.vocab. Text comes back from its ids as it was: nothing is normalised, and
characters outside the vocabulary become bytes (only U+2581, SentencePiece's own sign for a space, is lost).
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from megatron_mesh.errors import UserError
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error


def main(argv: Sequence[str]) -> None:
    """Train, then write."""
    arguments = _parser().parse_args(argv)
    model, corpus = Path(f"{arguments.output_prefix}.model"), Path(arguments.input)
    if model.exists():
        raise UserError(f"{model} already exists; delete it, or choose another --output-prefix")
    if not corpus.is_file():
        raise UserError(f"--input {corpus} does not exist; build_corpus.py writes such a file")
    model.parent.mkdir(parents=True, exist_ok=True)
    partial = model.with_suffix(".partial")
    lines = sample_lines(corpus, round(arguments.sample_megabytes * 1e6))
    train(lines, partial, arguments.vocab_size)
    for suffix in (".vocab", ".model"):
        os.replace(f"{partial}{suffix}", model.with_suffix(suffix))
    print(f"{model}: {arguments.vocab_size:,} pieces")


def sample_lines(corpus: Path, size: int) -> Iterator[str]:
    """Lines of the first documents of the corpus, ``size`` bytes of JSON altogether (no less than one)."""
    with corpus.open(encoding="utf-8") as file:
        for document in file:
            yield from json.loads(document)["text"].splitlines(keepends=True)
            size -= len(document.encode())
            if size <= 0:
                return


def train(lines: Iterator[str], prefix: Path, vocab_size: int) -> None:
    """Train BPE on ``lines`` and write ``prefix``.model and ``prefix``.vocab.

    Raises:
        UserError: the lines have fewer pieces than ``vocab_size``.
    """
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
            allow_whitespace_only_pieces=True,  # an indentation is one piece
            user_defined_symbols=["\n"],
            split_digits=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"the tokenizer cannot be trained: {error}; lower --vocab-size, or give more text"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", required=True, help='JSONL file with the text of each document under "text"')
    add("--output-prefix", required=True, help="path of the tokenizer, without .model")
    add("--vocab-size", type=int, default=4096, help="pieces, 256 bytes among them (default: 4096)")
    add("--sample-megabytes", type=float, default=8.0, help="text to train on (default: 8)")
    return parser


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
