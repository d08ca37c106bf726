"""From raw text to indexed data: worker processes parse and encode, one writes in the order of the input."""

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

from megatron_mesh.data.corpus import Chunk, expand_inputs, parse_chunk, read_chunks
from megatron_mesh.data.encode import Encoded, Encoder, GigatokenEncoder, choose_encoder, spot_check
from megatron_mesh.data.indexed import IndexedWriter
from megatron_mesh.data.long_texts import encode_texts
from megatron_mesh.data.tokenizer import Tokenizer
from megatron_mesh.errors import UserError

CHUNK_BYTES = 2 << 20
"""Text per task: some 20 ms of encoding, so that passing it between processes costs little."""
CHUNKS_PER_CHECK = 1000
"""gigatoken's ids are compared with the reference in one chunk of this many; the first is always one."""
SAMPLE_FILES, SAMPLE_PIECES, PIECE_CHARACTERS = 8, 64, 2048
"""The sample on which encoders are compared: pieces of the first documents of the first files."""


@dataclass
class PreprocessSettings:
    """What to read and write; names as Megatron-LM's tools/preprocess_data.py."""

    input: list[str]
    output_prefix: str
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    append_eod: bool = False
    workers: int = 1
    skip_broken: bool = False
    overwrite: bool = False
    fast: bool = True
    """Use gigatoken where it gives the same ids."""

    def prefix(self, key: str) -> str:
        """Prefix of the data of one key."""
        return f"{self.output_prefix}_{key}_document"


@dataclass
class Progress:
    """How far the work is."""

    disk_bytes: int = 0
    text_bytes: int = 0
    """Bytes of decompressed input."""
    documents: int = 0
    """Documents written, of all keys together; documents without a token are left out."""
    tokens: int = 0
    broken: list[str] = field(default_factory=list)
    """What was wrong with the documents left out."""
    cut: list[str] = field(default_factory=list)
    """Where documents were too long to be encoded whole and had to be cut (``long_texts.py``)."""
    chunks: int = 0
    checked: int = 0
    """Chunks in which gigatoken's ids were compared with the reference."""
    seconds: float = 0.0
    """Since the first chunk was read."""

    @property
    def speed(self) -> float:
        """MB (10^6 bytes) of decompressed input per second."""
        return self.text_bytes / 1e6 / max(self.seconds, 1e-9)


class _Result(NamedTuple):
    """What comes of a chunk: ids for each key, and for the console."""

    encoded: list[Encoded]
    broken: list[str]
    checked: bool


@dataclass(frozen=True)
class _Task:
    """What a worker does with each chunk."""

    encoder: Encoder
    keys: list[str]
    eod: int | None
    dtype: type[np.number[Any]]
    skip_broken: bool

    def __call__(self, chunk: Chunk, number: int) -> _Result:
        parsed = parse_chunk(chunk, self.keys, skip_broken=self.skip_broken)
        check = number % CHUNKS_PER_CHECK == 0 and isinstance(self.encoder, GigatokenEncoder)
        if check and (part := spot_check(self.encoder, [t for texts in parsed.texts for t in texts if t])):
            raise UserError(
                f"gigatoken gives other ids than Hugging Face's tokenizers for {part!r} ({chunk.place}). "
                "Nothing was written; run again with --encoder reference."
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
    """Encode all inputs into ``{output_prefix}_{key}_document.bin`` and ``.idx``, one pair for each key.

    ``on_start`` hears which encoder is used and why, and the size of the input on disk; ``on_progress``
    hears of every chunk that was written.
    Raises UserError for bad input, outputs that exist (unless ``overwrite``) and a corpus without a token;
    nothing is left or changed on disk then. Also raises it if gigatoken gives other ids than the tokenizer
    in one of the chunks that are compared: the first and every ``CHUNKS_PER_CHECK``th after it.
    """
    paths = expand_inputs(settings.input)
    _check_outputs(settings)
    chunks = chain.from_iterable(read_chunks(path, CHUNK_BYTES) for path in paths)
    with _environment("TOKENIZERS_PARALLELISM", "false"):  # the workers divide the work, not its threads
        encoder, reason = choose_encoder(tokenizer, _sample(paths, settings.json_keys), fast=settings.fast)
        on_start(reason, sum(path.stat().st_size for path in paths))
        dtype = DType.optimal_dtype(tokenizer.vocab_size)
        eod = tokenizer.eod if settings.append_eod else None
        task = _Task(encoder, settings.json_keys, eod, dtype, settings.skip_broken)
        return _run(task, chunks, settings, on_progress)


def _run(
    task: _Task,
    chunks: Iterable[Chunk],
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
                raise UserError(f"The corpus is empty: no text under {key!r} in {settings.input}{skipped}.")
        for writer in writers:
            writer.commit()
    progress.seconds = time.perf_counter() - start
    return progress


_task: _Task | None = None
"""In a worker process: its task, inherited by fork with the tokenizer loaded and nothing to pickle."""


def _map_in_order(task: _Task, chunks: Iterable[Chunk], workers: int) -> Iterator[tuple[Chunk, _Result]]:
    """Results in the order of the chunks, with a bounded number of chunks and bytes in memory."""
    if workers == 1:
        yield from ((chunk, task(chunk, number)) for number, chunk in enumerate(chunks))
        return
    pending: deque[tuple[Chunk, Future[_Result]]] = deque()
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
            "A worker process was killed, most likely for lack of memory: use fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(task: _Task) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches them too; the main process ends them


def _work(chunk: Chunk, number: int) -> _Result:
    assert _task is not None
    return _task(chunk, number)


def _sample(paths: list[Path], keys: list[str]) -> list[str]:
    """Pieces of the first documents, from several files; broken ones are for the real run to report."""
    pieces: list[str] = []
    for path in paths[:SAMPLE_FILES]:
        for chunk in islice(read_chunks(path, CHUNK_BYTES // 8), 1):
            texts = chain.from_iterable(parse_chunk(chunk, keys, skip_broken=True).texts)
            found = (text[i : i + PIECE_CHARACTERS] for text in texts for i in range(0, len(text), 16384))
            pieces += islice(found, SAMPLE_PIECES // min(len(paths), SAMPLE_FILES))
    return pieces


def _check_outputs(settings: PreprocessSettings) -> None:
    if settings.workers < 1:
        raise UserError(f"--workers {settings.workers}: at least 1 is needed.")
    if len(set(settings.json_keys)) != len(settings.json_keys):
        raise UserError(f"--json-keys names a key twice: {' '.join(settings.json_keys)}")
    for key in settings.json_keys:
        for path in (f"{settings.prefix(key)}.bin", f"{settings.prefix(key)}.idx"):
            if Path(path).exists() and not settings.overwrite:
                raise UserError(
                    f"{path} exists: choose another --output-prefix, or replace it with --overwrite."
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
