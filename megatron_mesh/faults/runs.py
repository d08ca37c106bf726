"""The run under test: its settings and data, and checks of its metrics, checkpoints and output."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_mesh.checkpoint.directory import saved_steps
from megatron_mesh.runtime.run_files import CHECKPOINTS, METRICS_FILE, earlier_versions

SETTINGS = """\
recurrence: mesh
layers: 1+1R2+1
hidden_size: 32
num_attention_heads: 2
seq_length: 16
vocab_size: 128
micro_batch_size: 2
global_batch_size: 8
lr: 1e-2
lr_warmup_iters: 1
split: 80,10,10
num_workers: 0
eval_iters: 1
log_interval: 1
progress: false
use_distributed_optimizer: true
async_save: true
keep_last: 2
"""


@dataclass(frozen=True)
class Setup:
    """A run that is trained once undisturbed, and again with faults."""

    directory: Path
    ranks: int
    steps: int
    save_interval: int

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.directory / "settings.yaml"

    def flags(self, save: Path) -> list[str]:
        """The flags of every start of a run in ``save``; the first start and later ones use the same."""
        return ["--config", str(self.config), "--save", str(save), "--load", str(save)]

    def saves_after(self, step: int) -> int:
        """How many checkpoints a run writes after it resumes at ``step``."""
        later = range(step + 1, self.steps + 1)
        return sum(s % self.save_interval == 0 or s == self.steps for s in later)


def write_inputs(setup: Setup) -> None:
    """Write a corpus of skewed random ids, and settings with an evaluation between any two saves."""
    # Imported late: it imports Megatron-core, which the ranks, which import this module, load only when
    # watched.
    from megatron_mesh.data.indexed import IndexedWriter

    generator = np.random.default_rng(0)
    documents = [generator.zipf(1.3, size=40) % 128 for _ in range(500)]
    prefix = setup.directory.resolve() / "text"
    with IndexedWriter(str(prefix), np.uint16) as writer:
        writer.add(np.concatenate(documents).astype(np.uint16), np.array([len(d) for d in documents]))
        writer.commit()
    lengths = {
        "train_iters": setup.steps,
        "save_interval": setup.save_interval,
        "eval_interval": max(1, setup.save_interval - 1),
        "data_path": prefix,
    }
    text = "".join(f"{name}: {value}\n" for name, value in lengths.items())
    setup.config.write_text(SETTINGS + text, encoding="utf-8")


def read_records(output: Path) -> list[dict]:
    """Read all records of the metrics. A killed run may leave half a line, which is skipped.

    A start that finds no checkpoint renames the metrics of an earlier one to metrics.1.jsonl and so on.
    """
    metrics = output / METRICS_FILE
    paths = [*earlier_versions(metrics), metrics]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.exists()]
    found = []
    for line in "\n".join(texts).splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def logged_steps(output: Path) -> list[int]:
    """The steps in the order in which they were logged."""
    return [record["step"] for record in read_records(output) if record["kind"] == "train"]


def logged_losses(output: Path) -> dict[tuple[str, int], set[float]]:
    """All losses ever logged, by kind (train, valid, test) and step."""
    found: dict[tuple[str, int], set[float]] = {}
    for record in read_records(output):
        if record["kind"] in ("train", "valid", "test"):
            found.setdefault((record["kind"], record["step"]), set()).add(record["loss"])
    return found


def compare_losses(calm: Path, hurt: Path) -> None:
    """Raise AssertionError unless a run has exactly the losses of the undisturbed one, bit for bit."""
    wanted, found = logged_losses(calm), logged_losses(hurt)
    different = [f"{kind} {step}" for kind, step in wanted if found.get((kind, step)) != wanted[kind, step]]
    assert not different, f"{hurt}: losses differ from the undisturbed run's: {', '.join(different)}"
    assert wanted.keys() == found.keys(), f"{hurt}: has losses of steps that the undisturbed run lacks"


def newest_step(save: Path) -> int:
    """The step of the newest complete checkpoint; 0 if there is none."""
    return max(saved_steps(save), default=0)


def unfinished_checkpoints(save: Path) -> list[str]:
    """Directories of checkpoints that are being written or deleted."""
    return [path.name for path in save.glob(CHECKPOINTS) if path.suffix]


def resume_message(text: str, stepped: bool) -> str:
    """Return what a start printed about where it begins, or "" if it was killed before it printed that.

    Args:
        stepped: whether it has begun a step.
    """
    complaints = [line for line in text.splitlines() if "is damaged" in line or line.startswith("error:")]
    loaded = re.findall(r"^resumed at step (\d+) from ", text, re.MULTILINE)
    begins = f"resumes at {loaded[-1]}" if loaded else "a new run" if stepped else ""
    return "; ".join([*complaints, begins] if begins else complaints)


def resume_error(message: str, complete: Sequence[int]) -> str:
    """Check that a start resumed from the newest checkpoint that it did not report as damaged.

    Args:
        message: the start's message, from ``resume_message``.
        complete: steps of the checkpoints that were complete before the start, ascending.

    Returns:
        What went wrong, for example "resumed at 4, but 8 was complete". "" if the start began where it
        should, or was killed before it printed where.
    """
    begins = re.search(r"(?:resumes at (\d+)|a new run)$", message)
    if begins is None:
        return ""
    step = int(begins[1] or 0)
    how = f"resumed at {step}" if step else "began a new run"
    if step not in (0, *complete):
        return f"{how}, where no checkpoint was complete"
    damaged = {int(number) for number in re.findall(r"iter_0*(\d+) is damaged", message)}
    skipped = [newer for newer in complete if newer > step and newer not in damaged]
    return f"{how}, but {skipped[-1]} was complete" if skipped else ""
