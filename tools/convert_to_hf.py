#!/usr/bin/env python
"""Convert a checkpoint to a directory that Hugging Face transformers loads, in one process without a GPU.

python tools/convert_to_hf.py --load runs/160m-mesh --save my-model

Any layout of training serves. Needs about 4 GiB of memory for any size of model. The directory holds the
weights (safetensors), the tokenizer, a model card and, for a looped model, the code:

    AutoModelForCausalLM.from_pretrained("my-model", trust_remote_code=True)
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mesh.errors import UserError
from megatron_mesh.hf.requirements import check_transformers

DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str]) -> None:
    """Convert as the command line says."""
    arguments = _parser().parse_args(argv)
    check_transformers()
    # These take seconds to import, and --help and mistakes do not need them.
    import torch

    from megatron_mesh.hf.export import export_checkpoint

    export_checkpoint(
        arguments.load,
        arguments.save,
        tokenizer_model=arguments.tokenizer_model,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        force=arguments.force,
    )
    print(f"wrote {arguments.save}")
    if not (arguments.save / "tokenizer.json").is_file():
        print("The training named no tokenizer, so there is none in it; --tokenizer-model adds it.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_to_hf.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "a run's directory (its newest checkpoint) or an iter_... in it"
    parser.add_argument("--load", type=Path, required=True, help=text)
    parser.add_argument("--save", type=Path, required=True, help="directory for the model")
    parser.add_argument("--tokenizer-model", help="where the tokenizer is now (default: where it was)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the checkpoint's)")
    parser.add_argument("--force", action="store_true", help="replace what is at --save")
    return parser


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
