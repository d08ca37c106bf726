"""Calls tools/submit_slurm.py with a tiny model."""

import json
from pathlib import Path

from tests.commands import tool

main = tool("submit_slurm")
MODEL = ["--layers", "1+1R2+1", "--hidden-size", "32", "--num-attention-heads", "2", "--seq-length", "16"]
MODEL += ["--vocab-size", "128", "--train-iters", "10", "--lr-warmup-iters", "1", "--global-batch-size", "16"]
DATA = ["--data-path", "/data/corpus_text_document"]
SAVING = ["--save-interval", "5"]


def submit(lab: Path, *flags: str) -> None:
    """Submit ``lab/run``."""
    main(["--site", str(lab / "site.sh"), "--save", str(lab / "run"), *MODEL, *DATA, *SAVING, *flags])


def log_steps(run: Path, *records: dict) -> None:
    """Write metrics.jsonl."""
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
