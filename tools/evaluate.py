#!/usr/bin/env python
"""Measure a trained model as the paper does: nine tasks at 0 and 5 shots, perplexities, in one table.

python tools/evaluate.py --load runs/160m-mesh --output-dir runs/160m-mesh/evaluation
python tools/evaluate.py --model exported --text pile-val.jsonl.zst --output-dir evaluation
python tools/evaluate.py --model exported --tasks piqa arc_easy --num-fewshot 0 \\
    --local-data eval-data --limit 100 --output-dir quick-look

Needs lm-evaluation-harness: pip install 'megatron_mesh[eval]'. Data come from the Hugging Face hub, or with
--local-data from files (and nothing is asked of the hub). The same command goes on after an interruption:
what is in --output-dir is not run again. results.json and results.md there hold the numbers, beside the
paper's and Pythia's.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_mesh.errors import UserError
from megatron_mesh.evaluation.tasks import SHOTS, TASKS, choose
from megatron_mesh.runtime.console import show_messages


def main(argv: Sequence[str]) -> None:
    """Evaluate as the command line says."""
    options = _parser().parse_args(argv)
    if options.local_data is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # huggingface_hub reads it when it is imported
    # torch and transformers take seconds to import, and --help and mistakes do not need them.
    tasks = choose(options.tasks)
    from megatron_mesh.evaluation.report import own_sheets, write_markdown
    from megatron_mesh.evaluation.run import Settings, evaluate

    results = evaluate(Settings(**{**vars(options), "tasks": tasks}))
    console = Console()
    for sheet in own_sheets(results):
        console.print(sheet.rich())
    path = write_markdown(results)
    print(f"wrote {results.path} and {path} (beside the paper's and Pythia's numbers)", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output-dir", type=Path, required=True, help="directory for the results, one for each model")

    group = parser.add_argument_group("the model: one of")
    group.add_argument("--model", type=Path, help="a Hugging Face model directory, ours or another")
    group.add_argument(
        "--load", type=Path, help="a training checkpoint: a run's directory or an iter_... in it"
    )
    group.add_argument(
        "--tokenizer-model",
        help="for --load: tokenizer.json or SentencePiece model (default: the training's)",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that --model brings (our exports of recursive models bring some)",
    )

    group = parser.add_argument_group("what to measure")
    group.add_argument(
        "--tasks", nargs="*", metavar="TASK", help=f"some of: {', '.join(TASKS)} (default: all; may be empty)"
    )
    group.add_argument(
        "--num-fewshot",
        nargs="+",
        type=int,
        default=SHOTS,
        metavar="N",
        help="examples in the prompt (default: 0 5)",
    )
    group.add_argument(
        "--text",
        nargs="+",
        default=(),
        metavar="FILE",
        help="perplexity on text: .jsonl or .txt, also compressed; documents are packed as in training",
    )
    group.add_argument("--json-keys", default="text", metavar="KEY", help="the text's key in JSON lines")
    group.add_argument("--local-data", type=Path, metavar="DIR", help="data and lm-eval task files (.yaml)")
    group.add_argument("--limit", type=int, metavar="N", help="only the first N documents, for a quick look")

    group = parser.add_argument_group("how")
    group.add_argument(
        "--batch-size",
        type=_batch_size,
        default=8,
        help='sequences at a time, or "auto" (default: %(default)s; --text takes one at a time with "auto")',
    )
    group.add_argument("--device", help="cpu, or a GPU by torch's name (default: the GPU if there is one)")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="precision (default: auto, the one the model is stored in)",
    )
    return parser


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


if __name__ == "__main__":
    show_messages(True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave no converted model behind
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on with what is left.", file=sys.stderr)
        sys.exit(130)
