#!/usr/bin/env python
"""Encode raw text (JSON Lines or plain text, also compressed) into indexed data, PREFIX.bin and PREFIX.idx.

    python tools/preprocess_data.py --input 'corpus/*.jsonl.zst' --output-prefix data/corpus \\
        --tokenizer-model tokenizer.json --append-eod --workers 8

Writes data/corpus_text_document.bin and .idx. To train on them: --data-path data/corpus_text_document. A
.json file must hold one object per line; if it doesn't, the error gives the command that converts it. A
worker needs about 12 bytes of memory for each byte of the longest document.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from megatron_mesh import command
from megatron_mesh.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_mesh.data.preprocess import PreprocessSettings, Progress

_SECONDS_BETWEEN_LINES = 10.0
_BROKEN_SHOWN = 10


@dataclass
class Options:
    """Options of the preprocessing."""

    input: tuple[str, ...]
    """Files or quoted globs: .jsonl, .json, .ndjson (one object per line), .txt, .text (one document per
    file), each also with .gz, .xz or .zst."""
    output_prefix: str
    """Write PREFIX_KEY_document.bin and .idx."""
    tokenizer_model: str
    """A tokenizer.json, a directory that holds one, or a SentencePiece .model."""
    tokenizer_type: str | None = None
    """HuggingFaceTokenizer or SentencePieceTokenizer. (default: by the file's name)"""
    json_keys: tuple[str, ...] = ("text",)
    """Keys to take from the JSON objects."""
    append_eod: bool = False
    """End every document with the end-of-document token."""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Worker processes; by default one per core."""
    encoder: Literal["auto", "reference"] = "auto"
    """reference uses the tokenizer's own library. auto uses the faster gigatoken if it gives the same ids,
    which is checked on one chunk in a thousand."""
    skip_broken: bool = False
    """Leave out broken documents and count them."""
    overwrite: bool = False
    """Replace existing outputs once the new ones are complete."""


def main(options: Options) -> None:
    """Preprocess, showing a progress bar on a terminal and lines in a log."""
    if not options.input or not options.json_keys:
        raise UserError(f"{'--json-keys' if options.input else '--input'} needs at least one value")
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from megatron_mesh.data import build_tokenizer
    from megatron_mesh.data.preprocess import PreprocessSettings, preprocess

    tokenizer = build_tokenizer(options.tokenizer_type, options.tokenizer_model)
    settings = PreprocessSettings(
        input=list(options.input),
        output_prefix=options.output_prefix,
        json_keys=list(options.json_keys),
        append_eod=options.append_eod,
        workers=options.workers,
        skip_broken=options.skip_broken,
        overwrite=options.overwrite,
        fast=options.encoder == "auto",
    )
    console = Console(stderr=True)
    with Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        total = bar.add_task("", start=False)

        def on_start(reason: str, disk_bytes: int) -> None:
            console.print(
                f"tokenizer: {tokenizer.path}, {tokenizer.vocab_size:,} ids; encoder: {reason}",
                soft_wrap=True,
                markup=False,
            )
            bar.update(total, total=disk_bytes)
            bar.start_task(total)

        lines = _line_printer(console)

        def on_progress(progress: "Progress") -> None:
            bar.update(total, completed=progress.disk_bytes, description=_numbers(progress))
            if not console.is_terminal:
                lines(progress)

        done = preprocess(tokenizer, settings, on_start=on_start, on_progress=on_progress)
    _report(done, settings)


def _numbers(progress: "Progress") -> str:
    size, speed = progress.text_bytes / 1e6, progress.speed
    return f"{progress.documents:,} documents, {progress.tokens:,} tokens, {size:,.1f} MB at {speed:.1f} MB/s"


def _line_printer(console: "Console") -> "Callable[[Progress], None]":
    """Return a function that prints progress at most every ten seconds."""
    due = _SECONDS_BETWEEN_LINES

    def show(progress: "Progress") -> None:
        nonlocal due
        if progress.seconds >= due:
            console.print(_numbers(progress), soft_wrap=True)
            due = progress.seconds + _SECONDS_BETWEEN_LINES

    return show


def _report(done: "Progress", settings: "PreprocessSettings") -> None:
    print(_numbers(done))
    for problem in done.broken[:_BROKEN_SHOWN]:
        print(f"skipped: {problem}")
    if done.broken:
        print(f"skipped {len(done.broken):,} broken documents")
    if done.cut:
        print(
            f"cut {len(done.cut):,} of {done.documents:,} documents that were too long to encode whole; some "
            f"ids at the cuts may differ (first: {done.cut[0]})"
        )
    if done.checked:
        print(f"spot-checked {done.checked:,} of {done.chunks:,} chunks: gigatoken gives the tokenizer's ids")
    for key in settings.json_keys:
        print(f"wrote {settings.prefix(key)}.bin and .idx")


if __name__ == "__main__":
    command.run(main)
