#!/usr/bin/env python
"""Tokens per second of generation: looped models beside stock GPT-NeoX of the same unrolled depth.

python tools/bench_generate.py --layers 2+4R2+2 --hidden-size 768 --num-attention-heads 12

The weights are random, the models take turns, and the quotients are of figures of one round.
"""

import argparse
import sys
from collections.abc import Sequence
from statistics import median

from megatron_mesh.config.layers import parse_layers
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error


def main(argv: Sequence[str]) -> None:
    """Measure and print a table."""
    arguments = _parser().parse_args(argv)
    layers = parse_layers(arguments.layers)
    if not layers.shared:
        raise UserError(f"--layers {arguments.layers} has no loop; write prelude+coreRloops+coda")
    # These take seconds to import, and --help and mistakes do not need them.
    import torch

    from megatron_mesh.bench.generation import STOCK, Shape, build_models, measure_generation
    from megatron_mesh.bench.report import Spread
    from megatron_mesh.recurrence import SCHEMES

    for scheme in arguments.schemes:
        if scheme not in SCHEMES or not SCHEMES[scheme].shared_core:
            raise UserError(f"--schemes {scheme} is no looped scheme with a shared core")
    length = arguments.prompt_tokens + arguments.new_tokens
    shape = Shape(layers, arguments.hidden_size, arguments.num_attention_heads, arguments.vocab_size, length)
    torch.manual_seed(0)
    prompt = torch.randint(shape.vocab_size, (arguments.batch_size, arguments.prompt_tokens))
    models = build_models(shape, arguments.schemes)
    if arguments.bf16:
        models = {name: model.bfloat16() for name, model in models.items()}
    found = measure_generation(models, prompt, arguments.new_tokens, arguments.rounds)
    print(f"{'model':<16}  tokens/s  of stock, median (quartiles) of {arguments.rounds} rounds")
    for name, speeds in found.items():
        ratios = [ours / stock for ours, stock in zip(speeds, found[STOCK], strict=True)]
        print(f"{name:<16}  {median(speeds):>8.1f}  {Spread.of(ratios)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layers", default="2+4R2+2", help="of the looped models (default: %(default)s)")
    add("--schemes", nargs="+", default=["base", "mesh"], help="(default: base mesh)")
    for name, value in {
        "hidden-size": 768,
        "num-attention-heads": 12,
        "vocab-size": 50304,
        "batch-size": 1,
        "prompt-tokens": 64,
        "new-tokens": 64,
        "rounds": 10,
    }.items():
        add(f"--{name}", type=int, default=value, help="(default: %(default)s)")
    add("--bf16", action="store_true", help="weights in bfloat16 (default: float32)")
    return parser


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
