#!/usr/bin/env python
"""Convert a Hugging Face model to a checkpoint to train on from: our exports, and any GPT-NeoX (Pythia).

python tools/convert_from_hf.py --load pythia-410m --save pythia-410m-megatron
python pretrain_mesh.py --config pythia-410m-megatron/config.yaml --load pythia-410m-megatron --finetune ...

The run can have any layout of ranks. A plain model can become a recursive one, for continued pretraining,
its routers new:

python tools/convert_from_hf.py --load pythia-410m --save recursive --to-recursive 4+8R2+4 --core average
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mesh.errors import UserError
from megatron_mesh.hf.requirements import check_transformers

CORES = ("average", "first", "stepwise")


def main(argv: Sequence[str]) -> None:
    """Convert as the command line says."""
    arguments = _parser().parse_args(argv)
    check_transformers()
    # Megatron-core takes seconds to import, and --help and mistakes do not need it.
    from megatron_mesh.hf.bring_in import Recursive, bring_in

    choices = {name: getattr(arguments, name) for name in ("recurrence", "core", "seed")}
    given = {name: value for name, value in choices.items() if value is not None}
    if given and not arguments.to_recursive:
        raise UserError(f"--{next(iter(given))} needs --to-recursive; add that or leave it out")
    recursive = Recursive(arguments.to_recursive, **given) if arguments.to_recursive else None
    model = bring_in(arguments.load, arguments.save, recursive)
    print(f"wrote {arguments.save} ({model.recurrence} {model.layers}); start from it with")
    print(
        f"  pretrain_mesh.py --config {arguments.save / 'config.yaml'} --load {arguments.save} --finetune ..."
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
    text = "layers of the core: mean of all loops' (default), the first loop's, or equal steps"
    group.add_argument("--core", choices=CORES, help=text)
    group.add_argument("--seed", type=int, help="of the new routers (default: 1234)")
    return parser


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
