"""Every scheme compared with its formula in the paper, and with the attributes that it declares."""

import ast
from pathlib import Path

import pytest
import torch

import megatron_mesh.recurrence as recurrence
from megatron_mesh.recurrence import SCHEMES, LoopState, RecurrenceOptions, build_scheme

H = 6
NAMES = [name for name, scheme in SCHEMES.items() if scheme.has_loop]
ADDED = {
    "base": (),
    "residual": ("h_t",),
    "anchor": ("h_0",),
    "anchor-emb": ("h_emb",),
    "residual+anchor": ("h_t", "h_0"),
    "anchor+anchor-emb": ("h_0", "h_emb"),
    "residual+anchor+anchor-emb": ("h_t", "h_0", "h_emb"),
}


def outputs(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 2, H, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("loops", [1, 2, 3])
def test_additive_schemes(name: str, loops: int) -> None:
    scheme = build_scheme(name, H, loops, RecurrenceOptions())
    h_emb, h_0, *cores = outputs(loops + 2)
    state = LoopState()
    torch.testing.assert_close(scheme.enter(0, h_emb, state), h_emb)
    torch.testing.assert_close(scheme.enter(1, h_0, state), h_0)
    named = {"h_emb": h_emb, "h_0": h_0, "h_t": h_0}
    for t, h_m in enumerate(cores):
        expected = h_m + sum(named[term] for term in ADDED[name]) if ADDED[name] else h_m
        named["h_t"] = scheme.enter(t + 2, h_m, state)
        torch.testing.assert_close(named["h_t"], expected)


@pytest.mark.parametrize("name", ["static", "dynamic"])
def test_mixed_schemes_start_as_base(name: str) -> None:
    scheme = build_scheme(name, H, 2, RecurrenceOptions()).double()
    scheme.init_parameters(lambda *_: pytest.fail("nothing is random here"))
    h_emb, h_0, first, second = outputs(4)
    state = LoopState()
    entered = [scheme.enter(i, x, state) for i, x in enumerate((h_emb, h_0, first, second))]
    for got, expected in zip(entered, (h_emb, h_0, first, second), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("loops,slots", [(1, 4), (2, 5), (3, 2)])
def test_number_of_parameters(name: str, loops: int, slots: int) -> None:
    scheme = build_scheme(name, H, loops, RecurrenceOptions(slots=slots))
    counted = sum(p.numel() for p in scheme.parameters())
    assert counted == SCHEMES[name].num_parameters(H, loops, slots)


@pytest.mark.parametrize("name", SCHEMES)
def test_attributes_match_the_parameters(name: str) -> None:
    scheme = SCHEMES[name]
    one, two = (scheme.num_parameters(H, loops, 5) for loops in (1, 2))
    assert scheme.per_loop_parameters == (one != two)
    assert scheme.shards_states == (one > 0 or scheme.saved_states(1) > 0)
    assert scheme.loops_can_vary() == (name in ADDED)


@pytest.mark.parametrize("name", NAMES)
def test_attributes_match_what_a_forward_does(name: str) -> None:
    scheme = build_scheme(name, H, 3, RecurrenceOptions(slots=6)).double()
    scheme.init_parameters(lambda _, weight, std: torch.nn.init.normal_(weight))
    seen: list[int] = []
    scheme.observer = lambda cycle, write, read: seen.append(cycle)
    state = LoopState()
    for index, x in enumerate(outputs(5)):
        new = scheme.enter(index, x, state) is not x
        assert new == scheme.makes_new_state(index) == (scheme.enter_flops(index, H, 6) > 0)
    assert ("h_emb" in state.kept) == scheme.keeps_embedding
    assert seen == ([0, 1, 2, 3] if scheme.uses_memory else [])


@pytest.mark.parametrize("name", NAMES)
def test_later_passes_read_only_what_was_shared(name: str) -> None:
    """Later passes get results of earlier passes only through ``share``.

    A pipeline runs each pass in a separate graph, so any other tensor would lose its gradient. Here ``share``
    cuts the graph, so each pass must depend only on its input.
    """
    scheme = build_scheme(name, H, 3, RecurrenceOptions(slots=6)).double()
    scheme.init_parameters(lambda _, weight, std: torch.nn.init.normal_(weight))
    state = LoopState(share=lambda x: (x, x.detach().requires_grad_()))
    inputs = [x.requires_grad_() for x in outputs(5)]
    entered = [scheme.enter(i, x, state) for i, x in enumerate(inputs)]
    for index, h in enumerate(entered):
        needed = torch.autograd.grad(h.sum(), inputs, retain_graph=True, allow_unused=True)
        # In a pipeline, a received output is a leaf, so later passes may read it directly.
        received = {i for i, x in enumerate(inputs) if any(x is kept for kept in state.outputs)}
        assert {i for i, g in enumerate(needed) if g is not None} <= {index} | received


def test_recurrence_imports_torch_alone() -> None:
    allowed = {"torch", "collections", "dataclasses", "typing"}
    for path in Path(recurrence.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            assert {name.split(".")[0] for name in names} <= allowed, path
