"""Importing Megatron-core doesn't import torch's compiler, but its fused functions are still compiled."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mesh.compat.imports import compile_at_first_call
from megatron_mesh.runtime import device

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(device.has_gpu(), reason="Transformer Engine may import the compiler too")
def test_a_rank_imports_no_compiler() -> None:
    code = (
        "import sys; from megatron_mesh import compat; compat.install(); import megatron_mesh.train;"
        "print('torch._inductor.compile_fx' in sys.modules, len(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    there, modules = done.stdout.split()
    assert there == "False" and int(modules) < 2_900, done.stderr  # 3,353 with it


def test_megatrons_fused_functions_are_compiled(monkeypatch) -> None:
    from megatron.core.fusions import fused_bias_gelu

    fused = compile_at_first_call(fused_bias_gelu.bias_gelu.__wrapped__)  # others may have called theirs
    compiled, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or compile_(f, backend="eager"))
    x, bias = torch.randn(3, 4), torch.randn(4)
    expected = torch.nn.functional.gelu(x + bias, approximate="tanh")
    for _ in range(2):
        torch.testing.assert_close(fused(bias, x), expected)
    assert [function.__name__ for function in compiled] == ["bias_gelu"]


def test_within_another_compiled_function_it_is_compiled_with_it() -> None:
    fused = compile_at_first_call(lambda x: x.sin() + 1)
    x = torch.randn(5)
    whole = torch.compile(lambda x: fused(x) * 2, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(x), (x.sin() + 1) * 2)
