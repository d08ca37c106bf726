#!/usr/bin/env python
"""Measure a trained model as the paper does: nine tasks at 0 and 5 shots, perplexities, in one table.

python tools/evaluate.py --load runs/160m-mesh --output-dir runs/160m-mesh/evaluation
python tools/evaluate.py --model exported --text pile-val.jsonl.zst --output-dir evaluation
python tools/evaluate.py --model exported --tasks piqa arc_easy --num-fewshot 0 \\
    --local-data eval-data --limit 100 --output-dir quick-look

Needs lm-evaluation-harness: pip install -e '.[eval]'. Data come from the Hugging Face hub, or with
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
from megatron_mesh.evaluation.engines import ENGINES
from megatron_mesh.evaluation.tasks import SHOTS, TASKS, choose_tasks
from megatron_mesh.runtime.console import show_messages
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error


def main(argv: Sequence[str]) -> None:
    """Evaluate as the command line says."""
    options = _parser().parse_args(argv)
    if options.local_data is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # huggingface_hub reads it when it is imported
    # torch and transformers take seconds to import, and --help and mistakes do not need them.
    tasks = choose_tasks(options.tasks)
    from megatron_mesh.evaluation.report import result_tables, write_markdown
    from megatron_mesh.evaluation.run import Settings, run_evaluation

    results = run_evaluation(Settings(**{**vars(options), "tasks": tasks}))
    console = Console()
    for table in result_tables(results):
        console.print(table.rich())
        console.print()
    path = write_markdown(results)
    print(f"wrote {results.path} and {path} (beside the paper's and Pythia's numbers)", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="directory for the results, one for each model"
    )
    _add_model(parser.add_argument_group("the model: --model or --load"))
    _add_measures(parser.add_argument_group("what to measure"))
    _add_ways(parser.add_argument_group("how"))
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", type=Path, help="a Hugging Face model directory, ours or another")
    add("--load", type=Path, help="a training checkpoint: a run's directory or an iter_... in it")
    add("--tokenizer-model", help="for --load: where the tokenizer is now (default: where it was)")
    text = "run the Python code that --model brings (our own exports do without)"
    add("--trust-remote-code", action="store_true", help=text)


def _add_measures(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    text = f"some of: {', '.join(TASKS)} (default: all; none with an empty list)"
    add("--tasks", nargs="*", metavar="TASK", help=text)
    text = "examples in the prompt (default: 0 5)"
    add("--num-fewshot", nargs="+", type=int, default=SHOTS, metavar="N", help=text)
    text = "perplexity on text: .jsonl or .txt, also compressed; documents are packed as in training"
    add("--text", nargs="+", default=(), metavar="FILE", help=text)
    add("--json-keys", default="text", metavar="KEY", help="key of the text in .jsonl (default: text)")
    text = "take data and lm-eval task files (.yaml) from here, not from the hub"
    add("--local-data", type=Path, metavar="DIR", help=text)
    add("--limit", type=int, metavar="N", help="only the first N documents, for a quick look")


def _add_ways(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    text = "tokens of a sequence (default: the model's); more than it was trained with gives worse results"
    add("--max-length", type=int, metavar="N", help=text)
    text = 'sequences at a time, or "auto" (default: %(default)s; with "auto", --text takes one at a time)'
    add("--batch-size", type=number_or_auto, default=8, help=text)
    add("--device", help="cpu, or a GPU by torch's name (default: the GPU if there is one)")
    text = "what runs the model: transformers, or vllm if it is installed (default: %(default)s)"
    add("--engine", choices=ENGINES, default=ENGINES[0], help=text)
    text = "precision (default: auto, the one the model is stored in)"
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=text)


def number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


if __name__ == "__main__":
    show_messages(True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave no converted model behind
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on with what is left.", file=sys.stderr)
        sys.exit(130)
