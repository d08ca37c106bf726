"""Internals of torch: submodules, data loaders, distributed checkpoints, dispatch."""

import copy
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "METADATA_CLASSES",
    "StorageInfo",
    "TorchDispatchMode",
    "argument_names",
    "cache_device_constructors",
    "end_workers",
    "shallow_copy",
    "tree_leaves",
]

_Module = TypeVar("_Module", bound=torch.nn.Module)

StorageInfo = _StorageInfo
"""Where a tensor lies in a file of a distributed checkpoint: relative path, offset, length."""

_DTYPES = {str(x).removeprefix("torch.") for x in vars(torch).values() if isinstance(x, torch.dtype)}

METADATA_CLASSES = {
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}
"""By module, the names that torch.distributed.checkpoint pickles in ``.metadata``. Constructing any of them
has no side effects, so they are safe to unpickle."""


def shallow_copy(module: _Module, **submodules: torch.nn.Module) -> _Module:
    """Return a copy that shares the module's parameters and submodules, except for those given by name."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **submodules}
    return twin


def end_workers(iterator: Any) -> None:
    """End the worker processes of a data loader's iterator now. torch itself waits until ``__del__``."""
    iterator._shutdown_workers()


def cache_device_constructors() -> None:
    """Make ``with torch.device(...)`` work after torch's tensor factories are replaced.

    It recognises the factories by identity, in a list that torch makes at the first use. If we have the list
    made now, it holds the originals, which the replacements call.
    """
    _device_constructors()


def argument_names(operation: Any) -> list[str]:
    """Return the argument names of an operation that ``TorchDispatchMode.__torch_dispatch__`` receives."""
    return [argument.name for argument in operation._schema.arguments]
