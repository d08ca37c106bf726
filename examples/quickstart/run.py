#!/usr/bin/env python
"""From the text of this Python installation to a trained MeSH model, in a few minutes on two cores.

python examples/quickstart/run.py

Each step is a command of its own, printed before it runs. A step that is done is skipped: after an
interruption the same command goes on, and the training with it, from its last checkpoint.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from report import SAMPLE_FILE, report
from steps import Step, from_here, run_all

from megatron_mesh.errors import UserError
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error
from megatron_mesh.runtime.run_files import LOSS_FIGURE, checkpoint_path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def main(argv: Sequence[str]) -> None:
    """Run the steps that are left, then say what came out."""
    options = _parser().parse_args(argv)
    steps = plan(options)
    start = time.monotonic()
    run_all(steps, notes=options.output_dir / "done.json")
    print(f"\nDone in {time.monotonic() - start:.0f} s.\n")
    print(report(options.output_dir, training=steps[-4], figures=steps[-3]))


def plan(options: argparse.Namespace) -> list[Step]:
    """The steps, in order; the last four are the training, the figures, the conversion and the sample."""
    directory = options.output_dir
    corpus, data, model, hf = (directory / name for name in ("corpus", "data", "model", "hf"))
    tokenizer = directory / "tokenizer/tokenizer.model"
    return [
        Step(
            "Collect the text that this Python installation carries",
            HERE / "build_corpus.py",
            {"--output-dir": corpus, "--megabytes": options.corpus_mb},
            output=corpus / "train.jsonl",
        ),
        Step(
            "Train a SentencePiece tokenizer",
            HERE / "train_tokenizer.py",
            {
                "--input": corpus / "train.jsonl",
                "--output-prefix": tokenizer.with_suffix(""),
                "--vocab-size": 4096,
            },
            output=tokenizer,
        ),
        *(
            Step(
                f"Turn the {text} text into token ids",
                ROOT / "tools/preprocess_data.py",
                {
                    "--input": corpus / f"{part}.jsonl",
                    "--output-prefix": data / part,
                    "--tokenizer-model": tokenizer,
                    "--append-eod": None,
                },
                output=data / f"{part}_text_document.idx",
            )
            for part, text in (("train", "training"), ("valid", "validation"))
        ),
        Step(
            "Pretrain",
            ROOT / "pretrain_mesh.py",
            {
                "--config": from_here(options.config.resolve()),
                "--train-iters": options.steps,
                "--train-data-path": data / "train_text_document",
                "--valid-data-path": data / "valid_text_document",
                "--tokenizer-model": tokenizer,
                "--save": model,
                "--load": model,
            },
            output=checkpoint_path(model, options.steps),
        ),
        Step(
            "Draw the loss and the routers' weights",
            ROOT / "tools/plot_run.py",
            {"--run": model},
            output=model / LOSS_FIGURE,
        ),
        Step(
            "Convert it for Hugging Face",
            ROOT / "tools/convert_to_hf.py",
            {"--load": model, "--save": hf},
            output=hf,
        ),
        Step(
            "Let it write",
            ROOT / "tools/generate.py",
            {
                "--model": hf,
                "--prompt": "The first argument",
                "--max-new-tokens": 60,
                "--output": directory / SAMPLE_FILE,
            },
            output=directory / SAMPLE_FILE,
        ),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    output, config = Path("runs/quickstart"), HERE / "quickstart.yaml"
    add("--output-dir", type=Path, default=output, help=f"directory for everything (default: {output})")
    add("--corpus-mb", type=float, default=16.0, help="text to collect, in MB (default: 16)")
    add("--config", type=Path, default=config, help="settings of the training (default: quickstart.yaml)")
    add("--steps", type=int, default=600, help="optimizer steps (default: 600)")
    return parser


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
