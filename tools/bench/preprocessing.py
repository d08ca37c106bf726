#!/usr/bin/env python
"""Speed of tools/preprocess_data.py against Megatron-LM's classic way, on the same text.

python tools/bench_preprocess.py --input corpus.jsonl.xz --tokenizer-model tokenizer.json --workers 2

Three ways, in turn, several rounds; the table shows medians of MB (10^6 bytes of JSONL) per second of wall
time, from the start of the worker processes to the finished .idx (importing modules is not counted):
  ours       gigatoken where it gives the same ids, the check included
  reference  the same tool with Hugging Face's tokenizers alone
  classic    Megatron-LM's tools/preprocess_data.py: multiprocessing.Pool.imap over the lines, json.loads and
             the Hugging Face tokenizer for each document, IndexedDatasetBuilder.add_document
The three outputs must be the same, byte for byte.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatron_mesh.data import build_tokenizer
from megatron_mesh.data.corpus import expand_inputs, parse_chunk, read_chunks
from megatron_mesh.data.preprocess import CHUNK_BYTES, PreprocessSettings, preprocess
from megatron_mesh.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import strict_json
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error

_classic_tokenizer: Tokenizer | None = None


def main(argv: Sequence[str]) -> None:
    """Measure and print the table."""
    arguments = _parser().parse_args(argv)
    if not isinstance(build_tokenizer(None, arguments.tokenizer_model), HuggingFaceTokenizer):
        raise UserError("--tokenizer-model: the comparison is for a tokenizer.json.")
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(directory) / "corpus.jsonl"
        _write_plain(arguments.input, corpus, arguments.document_characters)
        ways: dict[str, Callable[[str], None]] = {
            "classic": lambda prefix: _classic(corpus, prefix, arguments.tokenizer_model, arguments.workers),
            "reference": lambda prefix: _ours(corpus, prefix, arguments, fast=False),
            "ours": lambda prefix: _ours(corpus, prefix, arguments, fast=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in track(range(arguments.rounds), "rounds", console=Console(stderr=True)):
            for name, way in ways.items():
                start = time.perf_counter()
                way(f"{directory}/{name}")
                seconds[name].append(time.perf_counter() - start)
        _check_equal(directory, list(ways))
        _print_table(corpus.stat().st_size / 1e6, seconds, arguments.workers)


def _ours(corpus: Path, prefix: str, arguments: argparse.Namespace, *, fast: bool) -> None:
    tokenizer = build_tokenizer(None, arguments.tokenizer_model)
    preprocess(
        tokenizer,
        PreprocessSettings(
            [str(corpus)], prefix, append_eod=True, workers=arguments.workers, overwrite=True, fast=fast
        ),
    )


def _classic(corpus: Path, prefix: str, model: str, workers: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = build_tokenizer(None, model)
    path = f"{prefix}_text_document"
    builder = IndexedDatasetBuilder(f"{path}.bin", DType.optimal_dtype(tokenizer.vocab_size))
    with open(corpus, encoding="utf-8") as lines, multiprocessing.Pool(workers, _start, (model,)) as pool:
        for ids, lengths in pool.imap(_encode_line, lines, 32):
            builder.add_document(ids, lengths)
    builder.finalize(f"{path}.idx")


def _start(model: str) -> None:
    global _classic_tokenizer
    _classic_tokenizer = build_tokenizer(None, model)


def _encode_line(line: str) -> tuple[list[int], list[int]]:
    assert _classic_tokenizer is not None
    ids = _classic_tokenizer.tokenize(json.loads(line)["text"])
    ids.append(_classic_tokenizer.eod)
    return ids, [len(ids)]


def _write_plain(inputs: list[str], path: Path, characters: int) -> None:
    """Decompress the corpus once, so that all ways read the same file; cut documents if asked."""
    with open(path, "w", encoding="utf-8") as file:
        for source in expand_inputs(inputs):
            for chunk in read_chunks(source, CHUNK_BYTES):
                for text in parse_chunk(chunk, ["text"], skip_broken=False).texts[0]:
                    step = characters or len(text) or 1
                    for start in range(0, len(text), step):
                        file.write(strict_json.dumps({"text": text[start : start + step]}) + "\n")


def _check_equal(directory: str, names: list[str]) -> None:
    for suffix in (".bin", ".idx"):
        contents = {(Path(directory) / f"{name}_text_document{suffix}").read_bytes() for name in names}
        assert len(contents) == 1, f"the {suffix} files differ"


def _print_table(megabytes: float, seconds: dict[str, list[float]], workers: int) -> None:
    table = Table(title=f"{megabytes:.1f} MB of JSONL, {workers} workers, {len(seconds['ours'])} rounds")
    for column in ("way", "seconds (median)", "MB/s", "times classic"):
        table.add_column(column, justify="left" if column == "way" else "right")
    classic = statistics.median(seconds["classic"])
    for name, values in seconds.items():
        median = statistics.median(values)
        table.add_row(name, f"{median:.2f}", f"{megabytes / median:.1f}", f"{classic / median:.1f}")
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, help="JSONL files with the key text")
    parser.add_argument("--tokenizer-model", required=True, help="a tokenizer.json")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each way (default: 3)")
    parser.add_argument("--document-characters", type=int, default=0, help="cut documents to this length")
    return parser


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
