"""Count a rank's collectives and its waits for the device in each step of the real loop. Runs in workers.

A wait is anything that blocks the host until the GPU has finished earlier work:

- Python reads a tensor's value: ``item``, ``tolist``, ``numpy``, ``float``, ``int``, ``if tensor``.
- The size of a result depends on values, as with ``nonzero`` or indexing by a mask.
- A copy between host and device is not ``non_blocking``. ``torch.tensor(..., device=...)`` is such a copy.
- The code synchronizes explicitly: ``SYNCHRONIZING``, and functions in ``runtime/device.py`` that do so on a
  GPU.

Collectives and ``Work.wait`` don't count, because NCCL queues them on the device. On a CPU all memory is host
memory, so this also counts reads of tensors that would be in host memory on a GPU. Tests must exclude such
places (``IN_HOST_MEMORY``). ``tests/gpu/test_step.py`` lets CUDA itself detect the waits.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mesh.runtime import device

# The operator behind ``item``, comparisons that return a bool, operators whose result size depends on values.
READS = (
    "_local_scalar_dense",
    "equal",
    "allclose",
    "bincount",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
)
# Functions that wait for the device. On a CPU they do nothing or can't even be called.
SYNCHRONIZING: tuple[tuple[Any, str], ...] = (
    (torch.cuda, "synchronize"),
    (torch.cuda, "empty_cache"),
    (torch.cuda.Event, "synchronize"),
    (torch.cuda.Stream, "synchronize"),
    (torch.accelerator, "synchronize"),
)
# Reads of tensors that are in host memory even with a GPU: a batch from the loader, AdamW's step counters.
IN_HOST_MEMORY = {
    "train/step.py: _check_ids",
    "optim/adam.py: Adam._init_group",
    "optim/optimizer.py: _get_value",
}
CALLERS = ("/megatron_mesh/", "/tools/bench/", "/megatron/core/", "/torch/optim/")


@dataclass
class Seen:
    """Collectives and waits of one step."""

    collectives: Counter[str] = field(default_factory=Counter)
    """By operation and group, e.g. "allreduce data"; groups of one rank are ignored."""
    waits: Counter[str] = field(default_factory=Counter)
    """By file and function, e.g. "train/vote.py: _count"."""


class Watch(TorchDispatchMode):
    """Counts what this thread does inside ``with``, in ``seen``, which may be replaced at any time.

    Other threads, such as the checkpoint writer, are ignored because they don't delay the step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()
        self._thread = threading.get_ident()
        self._patches = ExitStack()

    def __enter__(self) -> "Watch":
        tensor = torch.Tensor
        for owner, name, waits in (
            (tensor, "tolist", _always),
            (tensor, "numpy", _always),
            (tensor, "cpu", _always),
            (tensor, "cuda", _is_blocking),
            (tensor, "to", _is_blocking_copy),
            (torch, "tensor", _has_device),
            (torch, "as_tensor", _has_device),
            (device, "synchronize", _always),
            (device, "seconds_between", _always),
            (device, "copy_to_host", _always),
            *((owner, name, _always) for owner, name in SYNCHRONIZING),
        ):
            self._patches.enter_context(
                patch.object(owner, name, self._counting(getattr(owner, name), waits))
            )
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            self._collective(name.strip("_"), args)
        elif name in READS or (name in ("index", "index_put_") and _counts_a_mask(name, args)):
            self._wait()
        return func(*args, **(kwargs or {}))

    def _collective(self, name: str, args: tuple[Any, ...]) -> None:
        group = dist.ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))
        if group.size() > 1:
            self.seen.collectives[f"{name} {_label(group)}"] += 1

    def _counting(self, original: Callable[..., Any], waits: Callable[..., bool]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_code.co_filename
            # Calls from inside torch copy to the device on which their arguments already are.
            if threading.get_ident() == self._thread and waits(*args, **kwargs) and "/torch/" not in caller:
                self._wait()
            return original(*args, **kwargs)

        return call

    def _wait(self) -> None:
        """Count a wait under the innermost function in our code, Megatron-core or torch's optimizers."""
        frame = sys._getframe(1)
        while frame.f_back is not None and not any(part in frame.f_code.co_filename for part in CALLERS):
            frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        self.seen.waits[f"{path.parent.name}/{path.name}: {frame.f_code.co_qualname}"] += 1


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _has_device(*args: Any, device: Any = None, **kwargs: Any) -> bool:
    return device is not None


def _is_blocking(*args: Any, non_blocking: bool = False, **kwargs: Any) -> bool:
    return not non_blocking


def _is_blocking_copy(*args: Any, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> bool:
    elsewhere = device is not None or any(isinstance(arg, torch.device | str) for arg in args[1:])
    return elsewhere and not non_blocking


def _counts_a_mask(name: str, args: tuple[Any, ...]) -> bool:
    """Whether torch must count a mask's true values, and so wait. Writing a single number needs no count."""
    masked = any(index is not None and index.dtype == torch.bool for index in args[1])
    return masked and not (name == "index_put_" and args[2].numel() == 1)


def _label(group: dist.ProcessGroup) -> str:
    """Name a process group as Megatron-core does."""
    groups = {
        "world": dist.group.WORLD,
        "data": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "model": parallel_state.get_model_parallel_group(),
    }
    names = {known.group_name: label for label, known in groups.items()}
    return names.get(group.group_name, group.group_name)
