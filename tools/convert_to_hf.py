#!/usr/bin/env python
"""Convert a checkpoint to a directory that Hugging Face transformers can load.

    python tools/convert_to_hf.py --load runs/160m-mesh --save my-model

The checkpoint may come from any rank layout. One process converts it, without a GPU and with about 4 GiB of
memory for a model of any size. The directory holds the weights (safetensors), the tokenizer, a model card
and, for a looped model, its code:

    AutoModelForCausalLM.from_pretrained("my-model", trust_remote_code=True)

If that code doesn't run with a newer transformers, replace it with the code of this package:

    python tools/convert_to_hf.py --refresh-code my-model

This changes the code, and the entries of config.json that describe it (auto_map, transformers_tested).
Weights, tokenizer and model card stay as they are, and code that you have edited is never overwritten.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from megatron_mesh import command
from megatron_mesh.errors import UserError


@dataclass
class Options:
    """Options of the conversion."""

    load: Path | None = None
    """A run's directory (its newest checkpoint), or an iter_... directory in it."""
    save: Path | None = None
    """Directory for the model."""
    tokenizer_model: str | None = None
    """Where the tokenizer is now. (default: where it was during training)"""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Precision of the weights. (default: the checkpoint's)"""
    force: bool = False
    """Replace what is at --save."""
    refresh_code: Path | None = None
    """Update the code in this exported model, and do nothing else."""


def main(options: Options) -> None:
    """Convert a checkpoint, or refresh the code of an export."""
    if options.refresh_code is not None:
        others = [each.name for each in fields(options) if each.name != "refresh_code"]
        for name in others:
            if getattr(options, name):
                raise UserError(f"--refresh-code takes no other option; leave out --{name.replace('_', '-')}")
        _refresh(options.refresh_code)
    elif options.load is None or options.save is None:
        raise UserError("give --load and --save, or --refresh-code")
    else:
        _convert(options, options.load, options.save)


def _convert(options: Options, load: Path, save: Path) -> None:
    from megatron_mesh.hf.convert.open_model import check_transformers

    check_transformers()
    import torch

    from megatron_mesh.hf.convert.export import export_checkpoint

    export_checkpoint(
        load,
        save,
        tokenizer_model=options.tokenizer_model,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        force=options.force,
    )
    print(f"wrote {save}")
    if not (save / "tokenizer.json").is_file():
        print(
            "The run was trained without a tokenizer, so the directory has none. --tokenizer-model adds one."
        )


def _refresh(directory: Path) -> None:
    from megatron_mesh.hf.convert.refresh import REPLACED, refresh_code

    changed = refresh_code(directory)
    if not changed:
        print(f"{directory} has no outdated code")
        return
    print(f"refreshed in {directory}: {', '.join(changed)}")
    if any(name.startswith(REPLACED) for name in changed):
        print(
            f"The old code has no checksum, so it may have been edited. It is kept in {directory / REPLACED}."
        )


if __name__ == "__main__":
    command.run(main)
