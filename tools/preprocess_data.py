#!/usr/bin/env python
"""Raw text into indexed data: JSON Lines or plain text, also .gz, .xz and .zst, into PREFIX.bin and .idx.

python tools/preprocess_data.py --input 'corpus/*.jsonl.zst' --output-prefix data/corpus \\
    --tokenizer-model tokenizer.json --append-eod --workers 8

writes data/corpus_text_document.bin and .idx; the trainer takes --data-path data/corpus_text_document.
A .json file must hold an object per line; for others the error says how to convert them. A worker needs about
12 bytes of memory for each byte of the longest document.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from megatron_mesh.data import build_tokenizer
from megatron_mesh.data.preprocess import PreprocessSettings, Progress, preprocess
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error

_SECONDS_BETWEEN_LINES = 10.0
_BROKEN_SHOWN = 10


def main(argv: Sequence[str]) -> None:
    """Preprocess as the command line says."""
    arguments = _parser().parse_args(argv)
    tokenizer = build_tokenizer(arguments.tokenizer_type, arguments.tokenizer_model)
    settings = PreprocessSettings(
        input=arguments.input,
        output_prefix=arguments.output_prefix,
        json_keys=arguments.json_keys,
        append_eod=arguments.append_eod,
        workers=arguments.workers,
        skip_broken=arguments.skip_broken,
        overwrite=arguments.overwrite,
        fast=arguments.encoder == "auto",
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

        def on_progress(progress: Progress) -> None:
            bar.update(total, completed=progress.disk_bytes, description=_numbers(progress))
            if not console.is_terminal:
                lines(progress)

        done = preprocess(tokenizer, settings, on_start=on_start, on_progress=on_progress)
    _report(done, settings)


def _numbers(progress: Progress) -> str:
    size, speed = progress.text_bytes / 1e6, progress.speed
    return f"{progress.documents:,} documents, {progress.tokens:,} tokens, {size:,.1f} MB at {speed:.1f} MB/s"


def _line_printer(console: Console) -> Callable[[Progress], None]:
    """Prints a line at most every ten seconds, for logs."""
    due = _SECONDS_BETWEEN_LINES

    def show(progress: Progress) -> None:
        nonlocal due
        if progress.seconds >= due:
            console.print(_numbers(progress), soft_wrap=True)
            due = progress.seconds + _SECONDS_BETWEEN_LINES

    return show


def _report(done: Progress, settings: PreprocessSettings) -> None:
    print(_numbers(done))
    for problem in done.broken[:_BROKEN_SHOWN]:
        print(f"skipped: {problem}")
    if done.broken:
        print(f"skipped {len(done.broken):,} broken documents")
    if done.cut:
        print(
            f"cut {len(done.cut):,} of {done.documents:,} documents: too long to be encoded whole, so some "
            f"ids at the cuts may differ (first: {done.cut[0]})"
        )
    if done.checked:
        print(f"spot-checked {done.checked:,} of {done.chunks:,} chunks: gigatoken's ids are the tokenizer's")
    for key in settings.json_keys:
        print(f"wrote {settings.prefix(key)}.bin and .idx")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        help="files or quoted globs: .jsonl, .json, .ndjson (an object per line), .txt, .text (a document "
        "per file), each also with .gz, .xz or .zst",
    )
    add("--output-prefix", required=True, help="the data are PREFIX_KEY_document.bin and .idx")
    add("--json-keys", nargs="+", default=["text"], help="keys to take from the JSON (default: text)")
    add(
        "--tokenizer-type",
        help="HuggingFaceTokenizer or SentencePieceTokenizer (default: by the file's name)",
    )
    add("--tokenizer-model", required=True, help="a tokenizer.json, a directory that holds one, or a .model")
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    add(
        "--encoder",
        choices=["auto", "reference"],
        default="auto",
        help="auto: gigatoken if its ids are the tokenizer's, which is checked in one chunk of a thousand; "
        "reference: the tokenizer's own library",
    )
    add("--skip-broken", action="store_true", help="leave broken documents out and count them")
    add("--overwrite", action="store_true", help="replace existing outputs, once the new ones are complete")
    return parser


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
