"""torch.compile, export, trace and function transforms work on our models as on a stock GPT-NeoX."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap

from tests.helpers import relative_error
from tests.unit.hf.models import IDS, SCHEMES, greedy, looped, stock

KINDS = [*SCHEMES, "stock"]
SMALL = {"prelude_layers": 0, "core_layers": 1, "coda_layers": 0}
"""Only a core of one layer, since each layer takes seconds to compile."""


@pytest.fixture(autouse=True)
def no_compiled_code_of_other_tests():
    torch._dynamo.reset()


def build(kind: str) -> Any:
    return stock(layers=1) if kind == "stock" else looped(kind, **SMALL)


@pytest.mark.parametrize(
    ("scheme", "loops", "prelude"),
    [
        pytest.param("mesh", 3, 1, marks=pytest.mark.versions),
        ("mesh", 2, 1),
        ("mesh", 1, 1),
        *((scheme, 2, 0) for scheme in SCHEMES),
    ],
)
def test_one_graph(scheme, loops, prelude) -> None:
    """For any number of loops, the model is one graph with the logits and gradients of eager mode."""
    model = looped(scheme, num_loops=loops, **SMALL | {"prelude_layers": prelude})
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        assert relative_error(compiled(IDS, use_cache=False).logits, model(IDS).logits) < 1e-5
    assert counter.frame_count == 1
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    gradients = _gradients(model, compiled)
    assert counter.frame_count == 1
    for name, expected in _gradients(model, model).items():
        assert relative_error(gradients[name], expected) < 1e-5, name


def test_inductor() -> None:
    """One case with the default backend."""
    model = build("mesh")
    gradients = _gradients(model, torch.compile(model, fullgraph=True))
    for name, expected in _gradients(model, model).items():
        assert relative_error(gradients[name], expected) < 1e-4, name


def _gradients(model: Any, function: Any) -> dict[str, Tensor]:
    model.zero_grad()
    function(IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_recompiles_as_often_as_a_stock_model() -> None:
    """For new batch sizes and lengths."""
    counts = []
    for kind in ("mesh", "stock"):
        model = build(kind)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        with torch.no_grad():
            for batch, length in ((2, 8), (3, 8), (4, 8), (4, 6)):
                ids = IDS[:1, :length].expand(batch, length).contiguous()
                assert relative_error(compiled(ids, use_cache=False).logits, model(ids).logits) < 1e-5
        counts.append(counter.frame_count)
    assert counts[0] <= counts[1]


def test_another_number_of_loops_recompiles() -> None:
    """Once for each number, with correct logits."""
    model = build("base")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for loops in (2, 3, 1):
            model.set_num_loops(loops)
            other = looped("base", num_loops=loops, **SMALL)
            assert relative_error(compiled(IDS, use_cache=False).logits, other(IDS).logits) < 1e-5
    assert counter.frame_count == 3


@pytest.mark.parametrize("kind", ["mesh", "stock"])
def test_generate_compiles_its_step(kind) -> None:
    """With a static cache, for which transformers compiles the decoding step on a GPU."""
    model = build(kind)
    expected = greedy(model)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(greedy(model, cache_implementation="static", disable_compile=True), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_export(kind) -> None:
    """Strict export with a dynamic length."""
    model = build(kind)
    lengths = {"input_ids": {1: torch.export.Dim("length", min=2, max=64)}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(
            model, (), {"input_ids": IDS, "use_cache": False}, strict=True, dynamic_shapes=lengths
        )
        for ids in (IDS, IDS[:, :5]):
            exported = program.module()(input_ids=ids, use_cache=False).logits
            assert relative_error(exported, model(ids).logits) < 1e-5


class Logits(nn.Module):
    """Returns only the logits, since a trace cannot return a ``ModelOutput``."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


@pytest.mark.versions
@pytest.mark.parametrize("kind", KINDS)
def test_trace(kind, tmp_path) -> None:
    """With gradients enabled, and after saving and loading."""
    if transformers.__version__.startswith("4."):
        pytest.skip("torch.jit.trace fails in the mask of transformers 4, even for a stock model")
    model = build(kind)
    torch.jit.trace(Logits(model), IDS).save(str(tmp_path / "model.pt"))
    for ids in (IDS, IDS.flip(0, 1)):
        assert relative_error(torch.jit.load(tmp_path / "model.pt")(ids), model(ids).logits) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_per_sample(kind) -> None:
    """``vmap`` of ``grad`` gives the same gradients as a loop over the samples."""
    model = build(kind)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "labels": ids[None], "use_cache": False}
        return functional_call(model, weights, (), inputs, tie_weights=False).loss

    together = vmap(grad(loss), in_dims=(None, 0))(weights, IDS)
    for row, ids in enumerate(IDS):
        model.zero_grad()
        model(ids[None], labels=ids[None]).loss.backward()
        for name, parameter in model.named_parameters():
            assert relative_error(together[name][row], parameter.grad) < 1e-4, name
