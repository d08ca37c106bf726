#!/usr/bin/env python
"""Train a small MeSH model from the text of this Python installation, in a few minutes on two cores.

    python examples/quickstart/run.py

Each step is a command of its own, printed before it runs. Steps that are done are skipped: after an
interruption, the same command resumes, and the training resumes from its last checkpoint.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from report import SAMPLE_FILE, report
from steps import Step, from_here, run_all

from megatron_mesh import command
from megatron_mesh.runtime.run_files import LOSS_FIGURE, checkpoint_path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass
class Options:
    """Options of the quickstart."""

    output_dir: Path = Path("runs/quickstart")
    """Directory for everything."""
    corpus_mb: float = 16.0
    """Text to collect, in MB."""
    config: Path = HERE / "quickstart.yaml"
    """Settings of the training."""
    steps: int = 600
    """Optimizer steps."""


def main(options: Options) -> None:
    """Run the remaining steps, then report the results."""
    steps = plan(options)
    start = time.monotonic()
    run_all(steps, notes=options.output_dir / "done.json")
    print(f"\nDone in {time.monotonic() - start:.0f} s.\n")
    print(report(options.output_dir, training=steps[-4], figures=steps[-3]))


def plan(options: Options) -> list[Step]:
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


if __name__ == "__main__":
    command.run(main, if_interrupted="Interrupted; the same command resumes from here.")
