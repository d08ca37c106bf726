#!/usr/bin/env python
"""Generate text from prompts on the command line, in a file, or typed in a dialogue.

python tools/generate.py --model my-model --prompt "It was a dark and stormy night"
python tools/generate.py --load runs/160m-mesh --prompt-file prompts.txt --temperature 0
python tools/generate.py --model my-model                      # reads prompts until an empty line

--model is a Hugging Face directory (tools/convert_to_hf.py writes one). --load is a run's directory or one of
its checkpoints, converted into a temporary directory. Prompts become the ids of the training either way.
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
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error

DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str]) -> None:
    """Generate as the command line says."""
    arguments = _parser().parse_args(argv)
    _check(arguments)
    prompts = list(_given(arguments))
    if arguments.prompt_file is not None and not prompts:
        raise UserError(f"--prompt-file {arguments.prompt_file} is empty; write one prompt per line")
    check_transformers()
    # These take seconds to import, and --help and mistakes do not need them.
    import transformers

    from megatron_mesh.hf.open_model import dtype_named, open_model, temporary_export
    from megatron_mesh.runtime import device

    transformers.utils.logging.set_verbosity_error()
    with ExitStack() as stack:
        directory = arguments.model
        if directory is None:
            directory = stack.enter_context(temporary_export(arguments.load, arguments.tokenizer_model))
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
    import torch

    # Without a prompt the model begins a document, as after an end-of-text token in training.
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    if ids == [None]:
        raise UserError("the prompt is empty and the tokenizer has no end-of-text token; write a prompt")
    given = torch.tensor([ids], device=model.device)
    drawn = arguments.temperature > 0 and arguments.num_beams == 1
    how: dict[str, Any] = {"do_sample": drawn, "num_beams": arguments.num_beams}
    if drawn:
        how |= {"temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": arguments.top_k}
    how |= {"max_new_tokens": arguments.max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    whole = model.generate(given, attention_mask=torch.ones_like(given), **how)
    # Whole texts are decoded: the first token of a part may lose the space before it.
    before, after = (tokenizer.decode(row, skip_special_tokens=True) for row in (given[0], whole[0]))
    return after[len(before) :]


def _show(text: str, output: Path | None) -> None:
    print(text, flush=True)
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            print(text, file=file)


def _given(arguments: argparse.Namespace) -> Iterator[str]:
    """The prompts, those of a file line by line.

    Only ``\\n`` and ``\\r\\n`` end a line. Other characters that Python takes for line ends, such as U+2028,
    are part of a prompt.
    """
    for prompt in arguments.prompt:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"--prompt {prompt!r} is not UTF-8; give it in a UTF-8 --prompt-file") from None
        yield prompt
    if arguments.prompt_file is not None:
        try:
            text = arguments.prompt_file.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt-file {arguments.prompt_file} cannot be read: {error}") from None
        yield from (line.removesuffix("\r") for line in text.removesuffix("\n").split("\n") if text)


def _dialogue() -> Iterator[str]:
    """Lines that the user types, up to an empty one."""
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
    add("--prompt", action="append", default=[], help="text to continue; may be given several times")
    add("--prompt-file", type=Path, help="UTF-8 file with one prompt per line; only line feeds end a line")
    add("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0: greedy (default: %(default)s)")
    add("--top-p", type=float, default=0.95, help="(default: %(default)s)")
    add("--top-k", type=int, default=0, help="0: no limit (default: %(default)s)")
    add("--num-beams", type=int, default=1, help="above 1: beam search (default: %(default)s)")
    add(
        "--num-loops", type=int, help="run the core this many times, if the scheme has no parameters per loop"
    )
    add("--dtype", choices=DTYPES, help="of the computation (default: the weights')")
    add("--attn-implementation", help="sdpa, eager or flash_attention_2 (default: sdpa)")
    add("--output", type=Path, help="new file for the text, which is also printed")
    add("--seed", type=int, default=0, help="for sampling (default: %(default)s)")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave no converted model behind
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
