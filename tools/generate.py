#!/usr/bin/env python
"""Let a model write: for prompts on the command line or in a file, or in a dialogue.

python tools/generate.py --model my-model --prompt "It was a dark and stormy night"
python tools/generate.py --load runs/160m-mesh --prompt-file prompts.txt --temperature 0
python tools/generate.py --model my-model                      # reads prompts until an empty line

--model is a Hugging Face directory (tools/convert_to_hf.py writes one), --load a run's directory or one of
its checkpoints, which is converted for as long.
"""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_mesh.errors import UserError
from megatron_mesh.hf.requirements import check_transformers

DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str]) -> None:
    """Write as the command line says."""
    arguments = _parser().parse_args(argv)
    _check(arguments)
    prompts = list(_given(arguments))
    if arguments.prompt_file is not None and not prompts:
        raise UserError(f"--prompt-file {arguments.prompt_file} is empty; put a prompt in each line")
    check_transformers()
    # These take seconds to import, and --help and mistakes do not need them.
    import transformers

    from megatron_mesh.hf.open_model import directory_of, dtype_named, open_model
    from megatron_mesh.runtime import device

    transformers.utils.logging.set_verbosity_error()
    with ExitStack() as stack:
        directory = arguments.model
        if directory is None:
            directory = stack.enter_context(directory_of(arguments.load, arguments.tokenizer_model))
        options: dict[str, Any] = {"dtype": dtype_named(arguments.dtype)}
        if arguments.num_loops is not None:
            options["num_loops"] = arguments.num_loops
        if arguments.attn_implementation is not None:
            options["attn_implementation"] = arguments.attn_implementation
        model, tokenizer = open_model(directory, **options)
        model.to(device.device())
        transformers.set_seed(arguments.seed)
        for prompt in prompts or _dialogue():
            _show(f"{prompt}{_continued(model, tokenizer, prompt, arguments)}\n", arguments.output)


def _continued(model: Any, tokenizer: Any, prompt: str, arguments: argparse.Namespace) -> str:
    """What the model adds to ``prompt``."""
    inputs = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)  # tokenizers of others may give them
    drawn = arguments.temperature > 0 and arguments.num_beams == 1
    how: dict[str, Any] = {"do_sample": drawn, "num_beams": arguments.num_beams}
    if drawn:
        how |= {"temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": arguments.top_k}
    ids = model.generate(
        **inputs, **how, max_new_tokens=arguments.max_new_tokens, pad_token_id=tokenizer.pad_token_id
    )
    # Whole texts are decoded: the first token of a part may lose the space before it.
    before, after = (
        tokenizer.decode(row, skip_special_tokens=True) for row in (inputs["input_ids"][0], ids[0])
    )
    return after[len(before) :]


def _show(text: str, output: Path | None) -> None:
    print(text, flush=True)
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            print(text, file=file)


def _given(arguments: argparse.Namespace) -> Iterator[str]:
    yield from arguments.prompt
    if arguments.prompt_file is not None:
        try:
            yield from arguments.prompt_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt-file cannot be read: {error}") from None


def _dialogue() -> Iterator[str]:
    """Lines that the user types, until an empty one."""
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not line:
            return
        yield line


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.model is None) == (arguments.load is None):
        raise UserError("give either --model (a Hugging Face directory) or --load (a checkpoint)")
    for name, least in {"max_new_tokens": 1, "num_beams": 1, "top_k": 0, "temperature": 0}.items():
        if getattr(arguments, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least {least}")
    if arguments.output is not None and arguments.output.exists():
        raise UserError(f"--output {arguments.output} exists already; choose another")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p {arguments.top_p} must be above 0 and at most 1")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, help="a Hugging Face directory")
    add("--load", type=Path, help="a run's directory (its newest checkpoint), or an iter_... in it")
    add("--tokenizer-model", help="with --load: where the tokenizer is now (default: where it was)")
    add("--prompt", action="append", default=[], help="text to go on from; may be given several times")
    add("--prompt-file", type=Path, help="a prompt in each line")
    add("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)")
    add("--top-p", type=float, default=0.95, help="(default: %(default)s)")
    add("--top-k", type=int, default=0, help="0: no limit (default: %(default)s)")
    add("--num-beams", type=int, default=1, help="above 1: beam search (default: %(default)s)")
    add("--num-loops", type=int, help="run the core so often, where the scheme has no parameters per loop")
    add("--dtype", choices=DTYPES, help="of the computation (default: the weights')")
    add("--attn-implementation", help="sdpa, eager or flash_attention_2 (default: sdpa)")
    add("--output", type=Path, help="a new file for the text, which is printed as well")
    add("--seed", type=int, default=0, help="of the drawing (default: %(default)s)")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave no converted model behind
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
