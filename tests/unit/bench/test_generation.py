"""The generation benchmark at toy size: its models are equally deep, and it prints a row for each."""

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from megatron_mesh.command import call
from megatron_mesh.config.layout import parse_layers
from megatron_mesh.errors import UserError
from tools.bench.generation import STOCK, ModelShape, build_models, main, measure_generation


def test_models_are_of_equal_depth() -> None:
    shape = ModelShape(parse_layers("1+2R3+1"), 32, 2, 64, 12)
    models = build_models(shape, ["base", "mesh"])
    assert type(models[STOCK]) is GPTNeoXForCausalLM and len(models[STOCK].gpt_neox.layers) == 8
    calls: dict[str, int] = {}
    for name, model in models.items():
        for module in model.modules():
            if type(module).__name__ == "GPTNeoXMLP":
                module.register_forward_hook(
                    lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1})
                )
    speeds = measure_generation(models, torch.zeros(2, 4, dtype=torch.long), new_tokens=3, rounds=2)
    assert all(len(found) == 2 and min(found) > 0 for found in speeds.values())
    assert calls == dict.fromkeys(models, 8 * 3 * 3)  # layers, tokens, rounds including the warm-up


def test_the_tool(capsys) -> None:
    sizes = "--hidden-size 32 --num-attention-heads 2 --vocab-size 64 --prompt-tokens 4 --new-tokens 2"
    call(main, f"--layers 1+1R2+1 {sizes} --rounds 2 --bf16".split())
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert rows == ["model", "stock", "base", "mesh"]
    for mistake in ("--layers 4", "--schemes vanilla+mesh", "--schemes nonsense"):
        with pytest.raises(UserError):
            call(main, mistake.split())
