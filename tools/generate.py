#!/usr/bin/env python
"""Generate text from prompts on the command line, in a file, or typed in a dialogue.

    python tools/generate.py --model my-model --prompt "It was a dark and stormy night"
    python tools/generate.py --load runs/160m-mesh --prompt-file prompts.txt --temperature 0
    python tools/generate.py --model my-model                      # reads prompts until an empty line

--model is a Hugging Face directory (tools/convert_to_hf.py writes one). --load is a run's directory or one of
its checkpoints, which is converted into a temporary directory. Either way, prompts get the token ids that the
training would give them.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import UseAppendAction

from megatron_mesh import command
from megatron_mesh.errors import UserError


@dataclass
class Options:
    """Options of the generation."""

    model: Path | None = None
    """A Hugging Face directory."""
    load: Path | None = None
    """A run's directory (its newest checkpoint), or an iter_... directory in it."""
    tokenizer_model: str | None = None
    """With --load: where the tokenizer is now. (default: where it was in training)"""
    prompt: Annotated[tuple[str, ...], UseAppendAction] = ()
    """Text to continue; may be given several times."""
    prompt_file: Path | None = None
    """UTF-8 file with one prompt per line; only line feeds end a line."""
    max_new_tokens: int = 64
    """Tokens to generate at most."""
    temperature: float = 0.8
    """Temperature of sampling; 0 for greedy decoding."""
    top_p: float = 0.95
    """Sample from the most probable tokens that have this probability together."""
    top_k: int = 0
    """Sample from this many most probable tokens; 0 for no limit."""
    num_beams: int = 1
    """Beams; above 1 for beam search."""
    num_loops: int | None = None
    """Run the core this many times, if the scheme has no parameters per loop. (default: as trained)"""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Precision of the computation. (default: the weights')"""
    attn_implementation: str | None = None
    """sdpa, eager or flash_attention_2. (default: sdpa)"""
    output: Path | None = None
    """New file for the text, which is printed as well."""
    seed: int = 0
    """Seed of sampling."""


def main(options: Options) -> None:
    """Continue every prompt."""
    from megatron_mesh.hf.convert.open_model import check_transformers

    _check(options)
    prompts = list(_given(options))
    if options.prompt_file is not None and not prompts:
        raise UserError(f"--prompt-file {options.prompt_file} is empty; write one prompt per line")
    check_transformers()
    import transformers

    from megatron_mesh.hf.convert.open_model import dtype_named, open_model, temporary_export
    from megatron_mesh.runtime import device

    transformers.utils.logging.set_verbosity_error()
    with ExitStack() as stack:
        directory = options.model
        if options.load is not None:
            directory = stack.enter_context(temporary_export(options.load, options.tokenizer_model))
        choices: dict[str, Any] = {"dtype": dtype_named(options.dtype)}
        if options.num_loops is not None:
            choices["num_loops"] = options.num_loops
        if options.attn_implementation is not None:
            choices["attn_implementation"] = options.attn_implementation
        assert directory is not None  # checked
        model, tokenizer = open_model(directory, **choices)
        model.to(device.device())
        transformers.set_seed(options.seed)
        for prompt in prompts or _dialogue():
            _show(f"{prompt}{_continued(model, tokenizer, prompt, options)}\n", options.output)


def _continued(model: Any, tokenizer: Any, prompt: str, options: Options) -> str:
    """The text that the model adds to ``prompt``."""
    import torch

    # Without a prompt the model begins a document, as after an end-of-text token in training.
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    if ids == [None]:
        raise UserError("the prompt is empty and the tokenizer has no end-of-text token; write a prompt")
    given = torch.tensor([ids], device=model.device)
    sampled = options.temperature > 0 and options.num_beams == 1
    how: dict[str, Any] = {"do_sample": sampled, "num_beams": options.num_beams}
    if sampled:
        how |= {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
    how |= {"max_new_tokens": options.max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    whole = model.generate(given, attention_mask=torch.ones_like(given), **how)
    # Decode whole texts: the first token of a part may lose the space before it.
    before, after = (tokenizer.decode(row, skip_special_tokens=True) for row in (given[0], whole[0]))
    return after[len(before) :]


def _show(text: str, output: Path | None) -> None:
    print(text, flush=True)
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            print(text, file=file)


def _given(options: Options) -> Iterator[str]:
    """The prompts of the command line, then those of the file, line by line.

    Only ``\\n`` and ``\\r\\n`` end a line. Other characters that Python takes for line ends, such as U+2028,
    are part of a prompt.
    """
    for prompt in options.prompt:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"--prompt {prompt!r} is not UTF-8; give it in a UTF-8 --prompt-file") from None
        yield prompt
    if options.prompt_file is not None:
        try:
            text = options.prompt_file.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt-file {options.prompt_file} cannot be read: {error}") from None
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


def _check(options: Options) -> None:
    if (options.model is None) == (options.load is None):
        raise UserError("give either --model (a Hugging Face directory) or --load (a checkpoint)")
    for name, least in {"max_new_tokens": 1, "num_beams": 1, "top_k": 0, "temperature": 0}.items():
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least {least}")
    if options.output is not None and options.output.exists():
        raise UserError(f"--output {options.output} exists already; choose another")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p {options.top_p} must be above 0 and at most 1")


if __name__ == "__main__":
    command.run(main, removes_files=True)
