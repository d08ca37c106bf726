"""Compare the speed of tools/preprocess_data.py with Megatron-LM's classic way on the same text.

    python -m tools.bench.preprocessing --input corpus.jsonl.xz --tokenizer-model tokenizer.json --workers 2

Three ways take turns for several rounds. The table shows medians of MB (10^6 bytes of JSONL) per second of
wall time, from starting the worker processes to the finished .idx; importing modules doesn't count.

  ours:      gigatoken if it gives the same ids; the check is included.
  reference: the same tool with Hugging Face tokenizers only.
  classic:   as Megatron-LM's tools/preprocess_data.py, with multiprocessing.Pool.imap over the lines,
             json.loads and a Hugging Face tokenizer per document, and IndexedDatasetBuilder.add_document.

The three outputs must be identical, byte for byte.
"""

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatron_mesh import command
from megatron_mesh.config.settings import at_least
from megatron_mesh.data import build_tokenizer
from megatron_mesh.data.corpus import expand_inputs, parse_chunk, read_chunks
from megatron_mesh.data.preprocess import CHUNK_BYTES, PreprocessSettings, preprocess
from megatron_mesh.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import strict_json

_classic_tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class Options:
    """The text, the tokenizer and the effort."""

    input: tuple[str, ...]
    """JSONL files with the key text."""
    tokenizer_model: str
    """A tokenizer.json."""
    workers: int = 2
    """Worker processes."""
    rounds: int = 3
    """Measurements of each way."""
    document_characters: int = 0
    """Split documents into pieces of this length; 0 leaves them whole."""


def main(options: Options) -> None:
    """Measure, and print the table."""
    at_least(1, options, "workers", "rounds")
    at_least(0, options, "document_characters")
    if not isinstance(build_tokenizer(None, options.tokenizer_model), HuggingFaceTokenizer):
        raise UserError(
            f"--tokenizer-model {options.tokenizer_model} is no Hugging Face tokenizer; give a tokenizer.json"
        )
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(directory) / "corpus.jsonl"
        _write_corpus(options.input, corpus, options.document_characters)
        ways: dict[str, Callable[[str], None]] = {
            "classic": lambda prefix: _classic(corpus, prefix, options.tokenizer_model, options.workers),
            "reference": lambda prefix: _ours(corpus, prefix, options, fast=False),
            "ours": lambda prefix: _ours(corpus, prefix, options, fast=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in track(range(options.rounds), "rounds", console=Console(stderr=True)):
            for name, way in ways.items():
                start = time.perf_counter()
                way(f"{directory}/{name}")
                seconds[name].append(time.perf_counter() - start)
        _check_equal(directory, list(ways))
        _print_table(corpus.stat().st_size / 1e6, seconds, options.workers)


def _ours(corpus: Path, prefix: str, options: Options, *, fast: bool) -> None:
    tokenizer = build_tokenizer(None, options.tokenizer_model)
    preprocess(
        tokenizer,
        PreprocessSettings(
            [str(corpus)], prefix, append_eod=True, workers=options.workers, overwrite=True, fast=fast
        ),
    )


def _classic(corpus: Path, prefix: str, model: str, workers: int) -> None:
    tokenizer = build_tokenizer(None, model)
    path = f"{prefix}_text_document"
    builder = IndexedDatasetBuilder(f"{path}.bin", DType.optimal_dtype(tokenizer.vocab_size))
    with (
        open(corpus, encoding="utf-8") as lines,
        multiprocessing.Pool(workers, _load_tokenizer, (model,)) as pool,
    ):
        for ids, lengths in pool.imap(_encode_line, lines, 32):
            builder.add_document(ids, lengths)
    builder.finalize(f"{path}.idx")


def _load_tokenizer(model: str) -> None:
    global _classic_tokenizer
    _classic_tokenizer = build_tokenizer(None, model)


def _encode_line(line: str) -> tuple[list[int], list[int]]:
    assert _classic_tokenizer is not None
    ids = _classic_tokenizer.tokenize(json.loads(line)["text"])
    ids.append(_classic_tokenizer.eod)
    return ids, [len(ids)]


def _write_corpus(inputs: Sequence[str], path: Path, characters: int) -> None:
    """Decompress the corpus once, so that all three ways read the same file. Split documents if asked."""
    with open(path, "w", encoding="utf-8") as file:
        for source in expand_inputs(list(inputs)):
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
    for column in ("way", "seconds (median)", "MB/s", "speed-up"):
        table.add_column(column, justify="left" if column == "way" else "right")
    classic = statistics.median(seconds["classic"])
    for name, values in seconds.items():
        median = statistics.median(values)
        table.add_row(name, f"{median:.2f}", f"{megabytes / median:.1f}", f"{classic / median:.1f}")
    Console().print(table)


if __name__ == "__main__":
    command.run(main)
