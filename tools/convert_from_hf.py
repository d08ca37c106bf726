#!/usr/bin/env python
"""Convert a Hugging Face model (an export of this project, or a GPT-NeoX) to a checkpoint for training.

    python tools/convert_from_hf.py --load pythia-410m --save pythia-410m-megatron
    python pretrain_mesh.py \\
        --config pythia-410m-megatron/config.yaml --load pythia-410m-megatron --finetune ...

The run can have any rank layout. For continued pretraining, a plain model can become a recursive one with new
routers:

    python tools/convert_from_hf.py --load pythia-410m --save recursive --to-recursive 4+8R2+4 --core average

A GPT-NeoX must compute what our models compute, as all Pythia models do: parallel residual, attention biases,
hidden_act "gelu", an even number of rotated dimensions per head, an integer rope_theta, and no RoPE scaling.
A model that differs in a way that changes its logits is refused with one line and exit status 2, for example
GPT-NeoX-20B (gelu_fast) or RedPajama-INCITE (use_parallel_residual false). Dropout is left out with a note.

Weights must be float32, bfloat16 or float16, without quantization or adapters. They are copied bit for bit;
if their dtypes differ, all become float32. The vocabulary is padded for tensor parallelism, and the loss
ignores the padding.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_mesh import command
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.run_files import CONFIG_FILE


@dataclass
class RecursiveOptions:
    """Make a recursive model from a plain one."""

    to_recursive: str | None = None
    """Layers of the new model as prelude+coreRloops+coda; its unrolled depth must be that of the old one.
    (default: stay plain)"""
    recurrence: str | None = None
    """Recurrence scheme. (default: mesh)"""
    core: Literal["average", "first", "stepwise"] | None = None
    """Initialize the core's layers with the mean over the layers that they replace (average), with the
    layers of the first loop (first), or with layers at equal distances over all loops (stepwise).
    (default: average)"""
    seed: int | None = None
    """Random seed for the new routers. (default: 1234)"""


@dataclass
class Options:
    """Options of the conversion."""

    load: Path
    """Directory of the Hugging Face model."""
    save: Path
    """Directory for the checkpoint."""
    recursive: RecursiveOptions


def main(options: Options) -> None:
    """Convert the model and print how to train it."""
    from megatron_mesh.hf.convert.open_model import check_transformers

    check_transformers()
    from megatron_mesh.hf.convert.import_model import ToRecursive, import_model

    asked = options.recursive
    choices = {name: getattr(asked, name) for name in ("recurrence", "core", "seed")}
    given = {name: value for name, value in choices.items() if value is not None}
    if given and not asked.to_recursive:
        raise UserError(f"--{next(iter(given))} needs --to-recursive; add that or leave it out")
    recursive = ToRecursive(asked.to_recursive, **given) if asked.to_recursive else None
    model = import_model(options.load, options.save, recursive)
    print(f"wrote {options.save} ({model.recurrence} {model.layers}); start a run from it with")
    print(f"  pretrain_mesh.py --config {options.save / CONFIG_FILE} --load {options.save} --finetune ...")


if __name__ == "__main__":
    command.run(main)
