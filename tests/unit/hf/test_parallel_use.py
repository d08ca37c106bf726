"""Exports on several devices: tensor parallelism, DDP with gradient checkpointing, and device maps."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from megatron_mesh.recurrence import SCHEMES as CLASSES
from tests.helpers import relative_error
from tests.unit.hf.models import IDS, SCHEMES, greedy, looped
from tests.unit.hf.test_logits import load
from tests.unit.hf.two_ranks import checkpointed_ddp, on_two_ranks, tensor_parallel

LAYERS = {"vanilla+mesh": "1+2+2+1", "vanilla": "4"}
KINDS = [*SCHEMES, "vanilla"]
"""The export of vanilla is a stock GPT-NeoX."""


@pytest.fixture(scope="module")
def directories(exported) -> dict[str, Path]:
    """An export of each scheme, with a vocabulary size that is divisible by two."""
    layers = {kind: LAYERS.get(kind, "1+2R2+1") for kind in KINDS}
    return {kind: exported(recurrence=kind, layers=layers[kind], vocab_size=96)[1] for kind in KINDS}


@pytest.fixture(scope="module")
def sharded(directories, tmp_path_factory) -> list[Any]:
    """The outputs of the exports with ``tp_plan="auto"`` on each of two ranks."""
    return on_two_ranks(tensor_parallel, directories, tmp_path_factory.mktemp("tensor-parallel"))


@pytest.fixture(scope="module")
def replicated(tmp_path_factory) -> list[Any]:
    """Gradients of two ranks with DDP."""
    return on_two_ranks(checkpointed_ddp, {}, tmp_path_factory.mktemp("data-parallel"))


@pytest.mark.versions
@pytest.mark.parametrize("kind", KINDS)
def test_tensor_parallelism(directories, sharded, kind) -> None:
    """Each rank has half of each large weight, and both have the logits and tokens of one process."""
    model = load(directories[kind])
    with torch.no_grad():
        expected = model(IDS).logits
    for rank in sharded:
        for name, parameter in model.named_parameters():
            if "embed" not in name:  # versions of transformers differ here, even for a stock model
                share = 1 if _is_whole(name) else 2
                assert rank[kind]["sizes"][name] * share == parameter.numel(), name
        assert relative_error(rank[kind]["logits"], expected) < 1e-5
        assert torch.equal(rank[kind]["tokens"], greedy(model))


def _is_whole(name: str) -> bool:
    """Whether a parameter is replicated: norms, routers, and biases that are added after the all-reduce."""
    if "norm" in name or "recurrence" in name:
        return True
    if "attention" not in name and transformers.__version__.startswith("4."):
        return True  # its plan misses MLPs (because of the 4 in their names) and heads, even in a stock model
    return name.endswith(("attention.dense.bias", "dense_4h_to_h.bias"))


@pytest.mark.versions
@pytest.mark.parametrize("way", ["default", "re-entrant", "other"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_checkpointing_with_ddp(replicated, scheme, way) -> None:
    """Gradients equal those without it, and of one process. Re-entrant checkpointing would fail."""
    model = looped(scheme).train()
    for row in range(2):
        (model(IDS[row : row + 1], labels=IDS[row : row + 1]).loss / 2).backward()
    for rank in replicated:
        for name, parameter in model.named_parameters():
            assert relative_error(rank[scheme, "kept"][name], parameter.grad) < 1e-5, name
            assert relative_error(rank[scheme, way][name], parameter.grad) < 1e-5, name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_device_maps_keep_layers_and_the_recurrence_whole(scheme) -> None:
    """For many memory limits."""
    accelerate = pytest.importorskip("accelerate")
    model = looped(scheme)
    parts = {"model.recurrence"}
    parts |= {name for name, module in model.named_modules() if type(module).__name__ == "MeshLayer"}
    size = sum(4 * parameter.numel() for parameter in model.parameters())
    cut = set()
    for percent in range(2, 100, 7):
        limits = {0: size * percent // 100, "cpu": size // 3, "disk": 2 * size}
        places = accelerate.infer_auto_device_map(
            model, max_memory=limits, no_split_module_classes=model._no_split_modules
        )
        inside = {name for name in places for part in parts if name.startswith(f"{part}.")}
        assert not inside, (percent, inside)
        cut.add(tuple(places.items()))
    assert len(cut) >= 5


def test_no_scheme_may_be_split() -> None:
    """Not even one that is added later."""
    assert {scheme.__name__ for scheme in CLASSES.values()} <= set(looped()._no_split_modules)


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_to_disk(directories, tmp_path, kind) -> None:
    """With every second module of the model, and the recurrence, on disk."""
    pytest.importorskip("accelerate")
    model = load(directories[kind])
    body = model.base_model_prefix
    parts = [f"{body}.{name}" for name, _ in model.base_model.named_children()]
    parts += [name for name, _ in model.named_children() if name != body]
    places = {part: "disk" if index % 2 else "cpu" for index, part in enumerate(parts)}
    places |= {"model.recurrence": "disk"} if kind != "vanilla" else {}
    offloaded = AutoModelForCausalLM.from_pretrained(
        directories[kind], trust_remote_code=True, device_map=places, offload_folder=tmp_path
    ).eval()
    assert any(parameter.is_meta for parameter in offloaded.parameters()), "nothing is on disk"
    with torch.no_grad():
        assert torch.equal(offloaded(IDS).logits, model(IDS).logits)
    assert torch.equal(greedy(offloaded, max_new_tokens=4), greedy(model, max_new_tokens=4))
