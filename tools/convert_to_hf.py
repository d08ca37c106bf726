#!/usr/bin/env python
"""Convert a checkpoint to a directory that Hugging Face transformers loads, in one process without a GPU.

python tools/convert_to_hf.py --load runs/160m-mesh --save my-model

The checkpoint may come from any parallel layout. Any size of model needs about 4 GiB of memory. The directory
holds the weights (safetensors), the tokenizer, a model card and, for a looped model, the code:

    AutoModelForCausalLM.from_pretrained("my-model", trust_remote_code=True)

If that code no longer runs with a newer transformers, replace it by this package's:

python tools/convert_to_hf.py --refresh-code my-model

This changes the code and, in config.json, the entries that describe it (auto_map, transformers_tested).
Weights, tokenizer and model card stay as they are. Code that was edited is never overwritten.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mesh.errors import UserError
from megatron_mesh.hf.requirements import check_transformers
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error

DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str]) -> None:
    """Convert as the command line says."""
    arguments = _parse(argv)
    if arguments.refresh_code:
        _refresh(arguments.refresh_code)
        return
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
        print("The training named no tokenizer, so the directory has none; --tokenizer-model adds it.")


def _refresh(directory: Path) -> None:
    from megatron_mesh.hf.refresh import REPLACED, refresh_code

    changed = refresh_code(directory)
    if not changed:
        print(f"{directory} has no outdated code")
        return
    print(f"refreshed in {directory}: {', '.join(changed)}")
    if any(name.startswith(REPLACED) for name in changed):
        print(
            f"The old code has no checksum, so it may have been edited. It is kept in {directory / REPLACED}."
        )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="convert_to_hf.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "a run's directory (its newest checkpoint) or an iter_... in it"
    parser.add_argument("--load", type=Path, help=text)
    parser.add_argument("--save", type=Path, help="directory for the model")
    parser.add_argument("--tokenizer-model", help="where the tokenizer is now (default: where it was)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the checkpoint's)")
    parser.add_argument("--force", action="store_true", help="replace what is at --save")
    text = "bring the code of an export up to date; goes with no other option"
    parser.add_argument("--refresh-code", type=Path, metavar="DIR", help=text)
    arguments = parser.parse_args(argv)
    others = [name for name, value in vars(arguments).items() if value and name != "refresh_code"]
    if arguments.refresh_code and others:
        parser.error(f"--refresh-code goes with no other option, not with --{others[0].replace('_', '-')}")
    if not arguments.refresh_code and not (arguments.load and arguments.save):
        parser.error("give --load and --save, or --refresh-code")
    return arguments


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
