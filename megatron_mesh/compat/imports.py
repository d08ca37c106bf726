"""Hook the import of a few modules of other packages.

**Unusable GPU libraries are hidden.** Megatron-core 0.16.1 takes the optimizer, gradient norms and much else
from Transformer Engine or apex if they can be imported. On a machine without a GPU the import succeeds, and
the first kernel fails (Transformer Engine 2.11: ``multi_tensor_l2norm``). This matters because a GPU
container also runs on login nodes. A Transformer Engine that doesn't fit the machine fails to import in
different ways: with an OSError if a CUDA library is missing, an ImportError if it was compiled for another
torch, a RuntimeError or AssertionError if it is badly installed (``transformer_engine/common/__init__.py``).
Megatron-core imports it in many places and catches only ImportError, in one place only ModuleNotFoundError
(``tensor_parallel/random.py``). ``model/implementation.py`` decides what such an installation means for a
run.

**torch's compiler is loaded when it is first used.** Megatron-core 0.16.1 decorates some forty functions with
``jit_fuser``, which is ``torch.compile`` (``megatron/core/jit.py``). The first of them makes torch import its
whole compiler: 770 of 3,350 modules, and a third of the import time, on every rank and in every tool. Our
settings use none of these functions (``model/transformer_config.py``: ``bias_activation_fusion`` and the like).

Silence messages of Megatron-core that are wrong or repeated here; all its other messages stay.
"""

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from megatron_mesh.compat import changes

BROKEN = (ImportError, OSError, RuntimeError, AssertionError)
"""The errors with which an unusable Transformer Engine or apex fails to import."""

_GPU_LIBRARIES = ("transformer_engine", "transformer_engine.pytorch", "apex", "amp_C")
_JIT = "megatron.core.jit"

_Execute = Callable[[ModuleType], None]


def hook(stack: ExitStack) -> None:
    """Hide unusable GPU libraries and defer loading torch's compiler, until ``stack`` is closed."""
    _hook(stack, _GPU_LIBRARIES, _import_if_usable)
    _hook(stack, [_JIT], functools.partial(_import_without_compiler, stack))


class _Finder(MetaPathFinder):
    """Finds the modules ``names`` as Python does, but executes them by ``run(execute, module)``."""

    def __init__(self, names: Sequence[str], run: Callable[[_Execute, ModuleType], None]):
        self.names, self.run = names, run

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.names:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: self.run(execute, module)  # type: ignore[method-assign]
        return spec


def _hook(stack: ExitStack, names: Sequence[str], run: Callable[[_Execute, ModuleType], None]) -> None:
    finder = _Finder(names, run)
    sys.meta_path.insert(0, finder)
    stack.callback(_unhook, finder)


def _unhook(finder: _Finder) -> None:
    with suppress(ValueError):
        sys.meta_path.remove(finder)


def _import_if_usable(execute: _Execute, module: ModuleType) -> None:
    """Turn any of ``BROKEN`` into a ModuleNotFoundError. Without a GPU, don't even try the import."""
    try:
        import torch

        if not torch.accelerator.is_available():
            raise ModuleNotFoundError("there is no GPU")
        execute(module)
    except BROKEN as error:
        raise ModuleNotFoundError(str(error), name=module.__name__) from error


def _import_without_compiler(stack: ExitStack, execute: _Execute, module: ModuleType) -> None:
    import torch

    execute(module)
    if getattr(module, "jit_fuser", None) is torch.compile:
        changes.replace(stack, module, "jit_fuser", compile_at_first_call)


def compile_at_first_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like ``torch.compile(function)``, but torch's compiler is loaded at the first call."""
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        import torch

        if torch.compiler.is_compiling():  # as a part of the caller, which is being compiled
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(torch.compile(function))
        return compiled[0](*args, **kwargs)

    return call


# Megatron-core prints in every process and from five modules that Transformer Engine and apex are missing.
# We log it once (runtime/device.py: describe).
_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed. Falling back to Torch Norm",
    "The following imports from `dynamic_context.py` will be removed",
)


def silence(stack: ExitStack) -> None:
    """Ignore the warnings that Megatron-core prints when it is imported, until ``stack`` is closed."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
        stack.callback(_remove, warnings.filters[0])


def _remove(entry: object) -> None:
    with suppress(ValueError):  # already gone: the program has reset its filters
        warnings.filters.remove(entry)  # type: ignore[attr-defined]
