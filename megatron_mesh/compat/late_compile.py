"""Load torch's compiler when it is first used, and not while Megatron-core is imported.

Megatron-core 0.16.1 decorates some forty functions with ``jit_fuser``, which is ``torch.compile``
(``megatron/core/jit.py``). The first of them makes torch import its whole compiler: 770 of 3,350 modules, and
a third of the import time, on every rank and in every tool. Our settings use none of these functions
(``model/config.py``: ``bias_activation_fusion`` and the like).
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from megatron_mesh.compat.import_hook import Execute, run_instead


def compiled_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like ``torch.compile(function)``, but torch's compiler is loaded at the first call."""
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        import torch

        if torch.compiler.is_compiling():  # as a part of what is being compiled
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(torch.compile(function))
        return compiled[0](*args, **kwargs)

    return call


def install() -> None:
    """Replace Megatron-core's decorator as soon as its module is imported."""
    run_instead(["megatron.core.jit"], _run)


def _run(execute: Execute, module: ModuleType) -> None:
    import torch

    execute(module)
    if getattr(module, "jit_fuser", None) is torch.compile:
        module.jit_fuser = compiled_when_called  # type: ignore[attr-defined]
