"""Compile the kernels for Hopper, on any machine; check that they access memory once, in wide words."""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.kernels.cases import Case, inputs_of


class _Compiled:
    """Replaces a kernel: compiles it for a launch's arguments, but doesn't launch it."""

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self.stages: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._compile, grid)

    def _compile(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        self.stages = self.kernel.warmup(*arguments, grid=grid, **options).asm


def compile_both(case: Case) -> dict[str, tuple[str, str]]:
    """Return Triton IR and PTX of both kernels for an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from megatron_mesh.kernels import triton_mixing

    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    (weights, *states), grad = inputs_of(case)
    needed = [torch.empty_like(x) if x.requires_grad else None for x in (weights, *states)]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "backward"):
            compiled = _Compiled(getattr(triton_mixing, f"_{name}"))
            patch.setattr(triton_mixing, f"_{name}", compiled)
            if name == "forward":
                triton_mixing.forward(grad, weights, tuple(states))
            else:
                triton_mixing.backward(needed[0], tuple(needed[1:]), grad, weights, tuple(states))
            found[name] = (compiled.stages["ttir"], compiled.stages["ptx"])
    return found


@pytest.mark.parametrize("terms,detached", [(2, ()), (5, ()), (4, (1,)), (3, (0,))])
def test_every_tensor_is_accessed_once(
    terms: int, detached: tuple[int, ...], compiler: Callable[..., Any]
) -> None:
    case = Case(5, 768, terms, torch.bfloat16, detached=detached)
    found = compiler(compile_both, case)
    weights_learn = 0 not in detached
    states_learn = terms - len(set(detached) - {0})

    assert _accesses(*found["forward"]) == {"states read": terms, "weights read": terms, "states written": 1}
    backward = {"states read": 1 + (terms if weights_learn else 0), "weights read": states_learn}
    written = {"states written": states_learn, "weights written": int(weights_learn)}
    assert _accesses(*found["backward"]) == {name: n for name, n in {**backward, **written}.items() if n}


def _accesses(ir: str, ptx: str) -> dict[str, int]:
    """Count the accesses of a program to its part of each tensor; those of states must be 16 bytes wide."""
    names = {("load", "bf16"): "states read", ("load", "f32"): "weights read"}
    names |= {("store", "bf16"): "states written", ("store", "f32"): "weights written"}
    found = Counter(names[pair] for pair in re.findall(r"tt\.(load|store) .*x!tt\.ptr<(\w+)>>", ir))
    for kind, name in (("ld", "states read"), ("st", "states written")):
        wide = len(re.findall(rf"{kind}\.global\.v4\.b32", ptx))
        assert wide == 2 * found[name]  # a thread has 16 elements, and an access covers 8
    assert ".local" not in ptx  # no array is indexed at run time
    return dict(found)


def test_all_loads_come_before_the_stores(compiler: Callable[..., Any]) -> None:
    for _, ptx in compiler(compile_both, Case(3, 2048, 4, torch.bfloat16)).values():
        order = re.findall(r"\b(ld|st)\.global", ptx)
        assert order == sorted(order), order
