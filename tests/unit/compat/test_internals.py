"""The internal names that compat uses exist, and other packages use them as compat assumes."""

import inspect
import pickle
import time
from pathlib import Path

import pytest
import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.tensor_parallel import random
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.distributed import checkpoint
from torch.utils.data import DataLoader

from megatron_mesh.compat import megatron_model, torch_internals


@pytest.mark.parametrize(
    "ours, base, method, caller",
    [
        (megatron_model.CustomTransformerBlock, TransformerBlock, "_build_layers", "__init__"),
        (megatron_model.CustomGPTModel, GPTModel, "_preprocess", "forward"),
    ],
)
def test_megatron_calls_the_methods_that_we_override(
    ours: type, base: type, method: str, caller: str
) -> None:
    assert method in vars(base) and method in vars(ours)
    assert f"self.{method}(" in inspect.getsource(getattr(base, caller))
    new = {name for name in vars(ours) if not name.startswith("_")}
    assert new and not any(hasattr(base, name) for name in new)


@pytest.mark.parametrize(
    "owner, method, arguments",
    [
        (TransformerLayer, "_forward_attention", ["self", "hidden_states", "attention_mask"]),
        (TransformerLayer, "_forward_pre_mlp_layernorm", ["self", "hidden_states"]),
        (TransformerLayer, "_forward_post_mlp", ["self", "mlp_output_with_bias", "residual"]),
        (Float16OptimizerWithFloat16Params, "_copy_main_params_to_model_params", ["self"]),
        (DistributedOptimizer, "_copy_main_params_to_model_params", ["self"]),
        (DistributedOptimizer, "_get_model_param_range_map", ["self", "param"]),
    ],
)
def test_megatron_has_the_methods_that_we_call(owner: type, method: str, arguments: list[str]) -> None:
    names = list(inspect.signature(getattr(owner, method)).parameters)
    assert names[: len(arguments)] == arguments


def test_megatron_sets_the_attention_switches() -> None:
    source = inspect.getsource(LanguageModule._set_attention_backend)
    assert all(name in source for name in megatron_model.ATTENTION_SWITCHES)


def test_the_generator_warning_has_its_logger() -> None:
    source = inspect.getsource(random)
    assert "getLogger(__name__).warning('CPU RNG state changed within GPU RNG context')" in source


def test_the_metadata_classes_are_those_of_torch(tmp_path: Path) -> None:
    """torch writes no others in a checkpoint of its own."""
    state = {
        "weight": torch.arange(6.0).view(2, 3),
        "ids": torch.arange(3),
        "half": torch.zeros(2).bfloat16(),
    }
    checkpoint.save(state, checkpoint_id=tmp_path, no_dist=True)
    named = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            named.add((module, name))
            return super().find_class(module, name)

    with (tmp_path / ".metadata").open("rb") as file:
        metadata = Unpickler(file).load()
    assert {type(place) for place in metadata.storage_data.values()} == {torch_internals.StorageInfo}
    assert all(
        name in torch_internals.METADATA_CLASSES.get(module, ()) for module, name in named - CHECKPOINT_ID
    )


CHECKPOINT_ID = {("pathlib", "PosixPath"), ("torch.distributed.checkpoint.metadata", "StorageMeta")}
"""torch's own writer adds the path of the checkpoint, which ours leaves out."""


def test_a_shallow_copy_shares_what_it_does_not_replace() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    twin = torch_internals.shallow_copy(module, **{"1": torch.nn.Tanh()})
    assert twin[0] is module[0]
    assert (type(twin[1]), type(module[1])) == (torch.nn.Tanh, torch.nn.ReLU)
    assert list(twin._modules) == list(module._modules)


def test_workers_end_at_once() -> None:
    iterator = iter(DataLoader(range(100), num_workers=1))
    next(iterator)
    (worker,) = iterator._workers
    start = time.monotonic()
    torch_internals.end_workers(iterator)
    assert not worker.is_alive() and time.monotonic() - start < 10


def test_dispatch_shows_operations_and_their_arguments() -> None:
    seen = {}

    class Mode(torch_internals.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[func.name()] = dict(zip(torch_internals.argument_names(func), args, strict=False))
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Mode():
        torch.add(x, x)
    assert torch_internals.tree_leaves(seen["aten::add.Tensor"]) == [x, x]
    assert list(seen["aten::add.Tensor"]) == ["self", "other"]
