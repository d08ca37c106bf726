"""Turns raw text into indexed data: worker processes parse and encode, the main process writes in order."""

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from megatron.core.datasets.indexed_dataset import DType

from megatron_mesh.data.corpus import TextChunk, expand_inputs, parse_chunk, read_chunks
from megatron_mesh.data.encode import (
    Encoded,
    Encoder,
    GigatokenEncoder,
    choose_encoder,
    encode_texts,
    spot_check,
)
from megatron_mesh.data.indexed import IndexedWriter
from megatron_mesh.data.tokenizer import Tokenizer
from megatron_mesh.errors import UserError

CHUNK_BYTES = 2 << 20
"""Text per task: about 20 ms of encoding, so that passing it between processes costs little."""
CHUNKS_PER_CHECK = 1000
"""Every so many chunks, starting with the first, gigatoken's ids are compared with the reference."""
SAMPLE_FILES, SAMPLE_PIECES, PIECE_CHARACTERS = 8, 64, 2048
"""Size of the sample on which encoders are compared: pieces of the first documents of the first files."""


@dataclass
class PreprocessSettings:
    """Inputs, outputs and options, with the names of Megatron-LM's tools/preprocess_data.py."""

    input: list[str]
    output_prefix: str
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    append_eod: bool = False
    workers: int = 1
    skip_broken: bool = False
    overwrite: bool = False
    fast: bool = True
    """Use gigatoken if it gives the same ids."""

    def prefix(self, key: str) -> str:
        """Return the prefix of the data of one key."""
        return f"{self.output_prefix}_{key}_document"


@dataclass
class Progress:
    """The progress of the work, and statistics at its end."""

    disk_bytes: int = 0
    text_bytes: int = 0
    """Bytes of decompressed input."""
    documents: int = 0
    """Number of documents written for all keys together. Documents without a token are left out."""
    tokens: int = 0
    broken: list[str] = field(default_factory=list)
    """For each skipped document, its place and what is wrong with it."""
    cut: list[str] = field(default_factory=list)
    """Places of documents that were too long to be encoded at once and had to be cut (``long_texts.py``)."""
    chunks: int = 0
    checked: int = 0
    """Number of chunks in which gigatoken's ids were compared with the reference."""
    seconds: float = 0.0
    """Time since the first chunk was read."""

    @property
    def speed(self) -> float:
        """Decompressed input in MB (10^6 bytes) per second."""
        return self.text_bytes / 1e6 / max(self.seconds, 1e-9)


class _Result(NamedTuple):
    """The result of a chunk: ids for each key, and information for the console."""

    encoded: list[Encoded]
    broken: list[str]
    checked: bool


@dataclass(frozen=True)
class _Task:
    """The work on one chunk: parse, encode, and sometimes compare encoders."""

    encoder: Encoder
    keys: list[str]
    eod: int | None
    dtype: type[np.number[Any]]
    skip_broken: bool

    def __call__(self, chunk: TextChunk, number: int) -> _Result:
        parsed = parse_chunk(chunk, self.keys, skip_broken=self.skip_broken)
        check = number % CHUNKS_PER_CHECK == 0 and isinstance(self.encoder, GigatokenEncoder)
        if check and (part := spot_check(self.encoder, [t for texts in parsed.texts for t in texts if t])):
            raise UserError(
                f"gigatoken gives other ids than Hugging Face's tokenizers for {part!r} ({chunk.place}); "
                "nothing was written; run again with --encoder reference"
            )
        return _Result([self._encode(texts) for texts in parsed.texts], parsed.broken, check)

    def _encode(self, texts: list[str]) -> Encoded:
        texts = [text for text in texts if text]
        if not texts:
            return Encoded(np.zeros(0, self.dtype), np.zeros(0, np.int32))
        ids, lengths, cut = encode_texts(self.encoder, texts)
        lengths = lengths[lengths > 0].astype(np.int32)
        ids = ids.astype(self.dtype)
        if self.eod is not None:
            ids = np.insert(ids, np.cumsum(lengths), self.eod)
            lengths += 1
        return Encoded(ids, lengths, cut)


def preprocess(
    tokenizer: Tokenizer,
    settings: PreprocessSettings,
    *,
    on_start: Callable[[str, int], None] = lambda reason, disk_bytes: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Encode all inputs into ``{output_prefix}_{key}_document.bin`` and ``.idx``, one pair per key.

    Args:
        on_start: called with the encoder and the reason for its choice, and the size of the input on disk.
        on_progress: called after each chunk is written.

    Raises:
        UserError: an input is bad, an output exists (unless ``overwrite``), the corpus has no token, or a
            spot check finds that gigatoken gives other ids than the tokenizer. Nothing is changed on disk
            then.
    """
    paths = expand_inputs(settings.input)
    _check_outputs(settings)
    chunks = chain.from_iterable(read_chunks(path, CHUNK_BYTES) for path in paths)
    with _environment("TOKENIZERS_PARALLELISM", "false"):  # parallelism comes from the worker processes
        encoder, reason = choose_encoder(tokenizer, _sample(paths, settings.json_keys), fast=settings.fast)
        on_start(reason, sum(path.stat().st_size for path in paths))
        dtype = DType.optimal_dtype(tokenizer.vocab_size)
        eod = tokenizer.eod if settings.append_eod else None
        task = _Task(encoder, settings.json_keys, eod, dtype, settings.skip_broken)
        return _run(task, chunks, settings, on_progress)


def _run(
    task: _Task,
    chunks: Iterable[TextChunk],
    settings: PreprocessSettings,
    on_progress: Callable[[Progress], None],
) -> Progress:
    progress, start = Progress(), time.perf_counter()
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedWriter(settings.prefix(key), task.dtype)) for key in task.keys]
        tokens = [0] * len(writers)
        for chunk, result in _map_in_order(task, chunks, settings.workers):
            for number, (writer, documents) in enumerate(zip(writers, result.encoded, strict=True)):
                writer.add(documents.ids, documents.lengths)
                tokens[number] += len(documents.ids)
                progress.documents += len(documents.lengths)
                progress.cut += [chunk.place] * documents.cut
            progress.chunks += 1
            progress.checked += result.checked
            progress.disk_bytes += chunk.disk_bytes
            progress.text_bytes += len(chunk.data)
            progress.tokens = sum(tokens)
            progress.broken += result.broken
            progress.seconds = time.perf_counter() - start
            on_progress(progress)
        for key, count in zip(task.keys, tokens, strict=True):
            if count == 0:
                skipped = f" ({len(progress.broken)} broken documents skipped)" if progress.broken else ""
                raise UserError(
                    f"the corpus is empty: no text under {key!r} in {settings.input}{skipped}; check --input "
                    "and --json-keys"
                )
        for writer in writers:
            writer.commit()
    progress.seconds = time.perf_counter() - start
    return progress


_task: _Task | None = None
"""The task of a worker process, inherited by fork: the tokenizer is neither pickled nor loaded again."""


def _map_in_order(
    task: _Task, chunks: Iterable[TextChunk], workers: int
) -> Iterator[tuple[TextChunk, _Result]]:
    """Yield results in the order of the chunks, with a bounded number of chunks and bytes in memory."""
    if workers == 1:
        yield from ((chunk, task(chunk, number)) for number, chunk in enumerate(chunks))
        return
    pending: deque[tuple[TextChunk, Future[_Result]]] = deque()
    waiting_bytes, most = 0, 3 * workers
    pool: Executor = ProcessPoolExecutor(
        workers, get_context("fork"), initializer=_start_worker, initargs=(task,)
    )
    try:
        for number, chunk in enumerate(chunks):
            pending.append((chunk, pool.submit(_work, chunk, number)))
            waiting_bytes += len(chunk.data)
            while len(pending) > most or (len(pending) > 1 and waiting_bytes > most * 2 * CHUNK_BYTES):
                first, future = pending.popleft()
                waiting_bytes -= len(first.data)
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most likely because memory ran out; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(task: _Task) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers, too; the main process ends them


def _work(chunk: TextChunk, number: int) -> _Result:
    assert _task is not None
    return _task(chunk, number)


def _sample(paths: list[Path], keys: list[str]) -> list[str]:
    """Return pieces of the first documents of several files. Broken documents are reported later."""
    pieces: list[str] = []
    for path in paths[:SAMPLE_FILES]:
        for chunk in islice(read_chunks(path, CHUNK_BYTES // 8), 1):
            texts = chain.from_iterable(parse_chunk(chunk, keys, skip_broken=True).texts)
            found = (text[i : i + PIECE_CHARACTERS] for text in texts for i in range(0, len(text), 16384))
            pieces += islice(found, SAMPLE_PIECES // min(len(paths), SAMPLE_FILES))
    return pieces


def _check_outputs(settings: PreprocessSettings) -> None:
    if settings.workers < 1:
        raise UserError(f"--workers {settings.workers} is too small; give at least 1")
    if len(set(settings.json_keys)) != len(settings.json_keys):
        raise UserError(f"--json-keys has a key twice: {' '.join(settings.json_keys)}; give each key once")
    for key in settings.json_keys:
        for path in (f"{settings.prefix(key)}.bin", f"{settings.prefix(key)}.idx"):
            if Path(path).exists() and not settings.overwrite:
                raise UserError(
                    f"{path} exists; choose another --output-prefix, or replace it with --overwrite"
                )


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
