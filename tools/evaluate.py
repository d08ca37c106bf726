#!/usr/bin/env python
"""Evaluate a model as the paper does: nine tasks at 0 and 5 shots, and perplexities, in one table.

    python tools/evaluate.py --load runs/160m-mesh --output-dir runs/160m-mesh/evaluation
    python tools/evaluate.py --model exported --text pile-val.jsonl.zst --output-dir evaluation
    python tools/evaluate.py --model exported --tasks piqa arc_easy --num-fewshot 0 \\
        --local-data eval-data --limit 100 --output-dir quick-look

Needs lm-evaluation-harness: pip install -e '.[eval]'. Data come from the Hugging Face hub, or with
--local-data from files, and then the hub is not contacted. After an interruption, the same command resumes:
results that are already in --output-dir are not computed again. They are written to results.json and
results.md, next to the paper's and Pythia's numbers.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from megatron_mesh import command
from megatron_mesh.evaluation.tasks import SHOTS, TASKS, choose_tasks


@dataclass
class ModelOptions:
    """The model: give --model or --load."""

    model: Path | None = None
    """A Hugging Face model directory, ours or another."""
    load: Path | None = None
    """A training checkpoint: a run's directory, or an iter_... directory in it."""
    tokenizer_model: str | None = None
    """With --load: where the tokenizer is now. (default: where it was in training)"""
    trust_remote_code: bool = False
    """Run the Python code that comes with --model (our own exports don't need this)."""


@dataclass
class MeasureOptions:
    """What to measure."""

    tasks: Annotated[
        tuple[str, ...] | None,
        arg(
            help=f"Tasks to run, of {', '.join(TASKS)}; none with an empty list.",
            help_behavior_hint="(default: all)",
        ),
    ] = None
    num_fewshot: tuple[int, ...] = SHOTS
    """Numbers of examples in the prompt."""
    text: tuple[str, ...] = ()
    """Files for perplexity: .jsonl or .txt, also compressed. Documents are packed as in training.
    (default: none)"""
    json_keys: str = "text"
    """Key of the text in .jsonl files."""
    local_data: Path | None = None
    """Take data and lm-eval task files (.yaml) from this directory, not from the hub."""
    limit: int | None = None
    """Use only the first N documents, for a quick look. (default: all)"""


@dataclass
class EngineOptions:
    """How to run the model."""

    max_length: int | None = None
    """Tokens in a sequence. Longer sequences than in training give worse results. (default: the model's)"""
    batch_size: int | Literal["auto"] = 8
    """Sequences in a batch, or auto. With auto, --text takes one sequence at a time."""
    device: str | None = None
    """cpu, or a GPU by torch's name. (default: the GPU if there is one)"""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Library that runs the model; vllm must be installed."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision; auto takes that of the stored weights."""


@dataclass
class Options:
    """Options of an evaluation."""

    output_dir: Path
    """Directory for the results, one for each model."""
    model: ModelOptions
    measure: MeasureOptions
    engine: EngineOptions


def main(options: Options) -> None:
    """Evaluate, print the table and write the files."""
    groups = {**vars(options.model), **vars(options.measure), **vars(options.engine)}
    if groups["local_data"] is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # huggingface_hub reads it when it is imported
    tasks = choose_tasks(groups["tasks"])
    from rich.console import Console

    from megatron_mesh.evaluation.report import result_tables, write_markdown
    from megatron_mesh.evaluation.run import Settings, run_evaluation

    results = run_evaluation(Settings(output_dir=options.output_dir, **{**groups, "tasks": tasks}))
    console = Console()
    for table in result_tables(results):
        console.print(table.rich())
        console.print()
    path = write_markdown(results)
    print(f"wrote {results.path} and {path} (with the paper's and Pythia's numbers)", file=sys.stderr)


if __name__ == "__main__":
    command.run(
        main,
        show_progress=True,
        removes_files=True,
        if_interrupted="Interrupted; the same command resumes with the remaining tasks.",
    )
