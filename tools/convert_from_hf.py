#!/usr/bin/env python
"""Convert a Hugging Face model to a checkpoint that a run can start from: our exports, and GPT-NeoX.

python tools/convert_from_hf.py --load pythia-410m --save pythia-410m-megatron
python pretrain_mesh.py --config pythia-410m-megatron/config.yaml --load pythia-410m-megatron --finetune ...

The run can have any layout of ranks. A plain model can become a recursive one with new routers, for continued
pretraining:

python tools/convert_from_hf.py --load pythia-410m --save recursive --to-recursive 4+8R2+4 --core average

A GPT-NeoX can be converted if it computes what our models do, like all of Pythia: parallel residual,
attention biases, hidden_act "gelu", an even number of rotated dimensions per head, a whole rope_theta, no
RoPE scaling. GPT-NeoX-20B (gelu_fast) and RedPajama-INCITE (use_parallel_residual false) are refused, as is
anything else that would change the logits: one line, exit code 2. Weights are float32, bfloat16 or float16,
without quantization or adapters, and kept bit for bit; if their dtypes differ, all become float32. Dropout
is left out with a note. The vocabulary is padded for tensor parallelism; the loss ignores the padding.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mesh.errors import UserError
from megatron_mesh.hf.requirements import check_transformers
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error
from megatron_mesh.runtime.run_files import CONFIG_FILE

CORES = ("average", "first", "stepwise")


def main(argv: Sequence[str]) -> None:
    """Convert a model as the command line asks."""
    arguments = _parser().parse_args(argv)
    check_transformers()
    # Megatron-core takes seconds to import, and --help doesn't need it.
    from megatron_mesh.hf.bring_in import Recursive, bring_in

    choices = {name: getattr(arguments, name) for name in ("recurrence", "core", "seed")}
    given = {name: value for name, value in choices.items() if value is not None}
    if given and not arguments.to_recursive:
        raise UserError(f"--{next(iter(given))} needs --to-recursive; add that or leave it out")
    recursive = Recursive(arguments.to_recursive, **given) if arguments.to_recursive else None
    model = bring_in(arguments.load, arguments.save, recursive)
    print(f"wrote {arguments.save} ({model.recurrence} {model.layers}); start a run from it with")
    print(
        f"  pretrain_mesh.py --config {arguments.save / CONFIG_FILE} --load {arguments.save} --finetune ..."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_from_hf.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", type=Path, required=True, help="directory of the Hugging Face model")
    parser.add_argument("--save", type=Path, required=True, help="directory for the checkpoint")
    group = parser.add_argument_group("a recursive model from a plain one")
    group.add_argument(
        "--to-recursive", metavar="LAYERS", help="prelude+coreRloops+coda, as deep as the model"
    )
    group.add_argument("--recurrence", help="scheme (default: mesh)")
    text = "layers of the core: the mean over all loops (default), the first loop's, or some at equal steps"
    group.add_argument("--core", choices=CORES, help=text)
    group.add_argument("--seed", type=int, help="seed of the new routers (default: 1234)")
    return parser


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
