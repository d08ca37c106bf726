"""The report at the end of the quickstart: how good the model is, where the files are, what to do next."""

import json
import math
import textwrap
from dataclasses import replace
from pathlib import Path

from steps import Step, from_here, shell

from megatron_mesh.metrics.figures import read_metrics
from megatron_mesh.runtime.run_files import CONFIG_FILE, LOSS_FIGURE, METRICS_FILE, ROUTERS_FIGURE

SAMPLE_FILE = "sample.txt"
_TOKEN_BYTES = 2  # in the .bin files: a vocabulary of 4,096 fits in 16 bits


def report(output: Path, training: Step, figures: Step) -> str:
    """The report, from the files in ``output``."""
    return "\n\n".join(
        [_results(output), _sample(output), _places(output), _next_commands(output, training, figures)]
    )


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """Convert a loss in nats per token to bits per byte of text, which doesn't depend on the tokenizer."""
    return loss / math.log(2) * tokens / text_bytes


def _results(output: Path) -> str:
    rows = read_metrics(output / "model")
    first, last, valid = rows["train"][0], rows["train"][-1], rows["valid"][-1]
    with (output / "corpus/valid.jsonl").open(encoding="utf-8") as file:
        text_bytes = sum(len(json.loads(line)["text"].encode()) for line in file)
    tokens = (output / "data/valid_text_document.bin").stat().st_size // _TOKEN_BYTES
    bits = bits_per_byte(valid["loss"], tokens, text_bytes)
    return (
        f"After {last['step']:,} steps and {last['consumed_tokens']:,} tokens:\n"
        f"  training loss    {first['loss']:.3f} at step 1, {last['loss']:.3f} at the end (nats per token)\n"
        f"  validation loss  {valid['loss']:.3f}, perplexity {valid['perplexity']:.1f}; "
        f"{bits:.2f} bits per byte of text"
    )


def _sample(output: Path) -> str:
    text = (output / SAMPLE_FILE).read_text(encoding="utf-8").strip()
    return "Generated text:\n" + textwrap.indent(text, "  ")


def _places(output: Path) -> str:
    model = output / "model"
    places = {
        output / "corpus": "the text, one JSON object per line",
        output / "tokenizer": "the SentencePiece tokenizer",
        output / "data": "token ids for training and validation (.bin and .idx)",
        model: "checkpoints",
        model / CONFIG_FILE: "every setting of the run",
        model / METRICS_FILE: "metrics of every logged step",
        model / LOSS_FIGURE: "plot of the training and validation loss",
        model / ROUTERS_FIGURE: "plot of where the routers write and read, per loop",
        output / "hf": "the model for Hugging Face transformers",
    }
    width = max(len(str(path)) for path in places)
    return "\n".join(["Files:", *(f"  {path!s:<{width}}  {what}" for path, what in places.items())])


def _next_commands(output: Path, training: Step, figures: Step) -> str:
    steps = training.flags["--train-iters"]
    assert isinstance(steps, int)
    other = output.with_name(f"{output.name}-anchor")
    longer = _with(training, {"--train-iters": 2 * steps, "--override-opt-param-scheduler": None})
    scheme = _with(training, {"--save": other, "--load": other, "--recurrence": "anchor"})
    python, program = training.command[:2]
    preset = from_here(training.program.parent / "examples/configs/pythia-160m.yaml")
    commands = {
        "Train twice as long, from the last checkpoint:": shell(longer.command),
        "Then plot it again:": shell(figures.command),
        "Train another recurrence scheme on the same data:": shell(scheme.command),
        "Print the plan of a model of the paper (examples/configs has all of them):": shell(
            [python, program, "--config", f"{preset}", "--dry-run"]
        ),
        "List all settings:": shell([python, program, "--help"]),
    }
    return "\n".join(["Next steps:", *(f"\n{title}\n{line}" for title, line in commands.items())])


def _with(step: Step, flags: dict[str, object]) -> Step:
    return replace(step, flags={**step.flags, **flags})
