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
    """A copy that shares parameters and submodules with ``module``, except for those given by name."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **submodules}
    return twin


def end_workers(iterator: Any) -> None:
    """End the worker processes of a data loader's iterator now; by itself torch does so in ``__del__``."""
    iterator._shutdown_workers()


def cache_device_constructors() -> None:
    """Let ``with torch.device(...)`` recognise the tensor factories that torch has now.

    It recognises them by identity, from a list made at its first use. If they are replaced afterwards, the
    originals that the replacements call are still recognised.
    """
    _device_constructors()


def argument_names(operation: Any) -> list[str]:
    """Names of an operation's arguments, in ``TorchDispatchMode.__torch_dispatch__``."""
    return [argument.name for argument in operation._schema.arguments]
