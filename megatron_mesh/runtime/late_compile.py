"""Load torch's compiler when it is first used, and not while Megatron-core is imported.

Megatron-core 0.16.1 decorates some forty functions with ``jit_fuser``, which is ``torch.compile``
(``megatron/core/jit.py``). To decorate one, torch imports its whole compiler: 770 modules more, which take a
third of the time of all imports, on every rank and in every tool. Our settings use none of these functions
(``model/config.py``: ``bias_activation_fusion`` and the like).
"""

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_NAME = "megatron.core.jit"


def compiled_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same as ``torch.compile(function)``, but compiled by nobody until the first call."""
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


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the module as Python does, and replace its decorator after it has run."""
        if fullname != _NAME:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            import torch

            execute(module)
            if getattr(module, "jit_fuser", None) is torch.compile:
                module.jit_fuser = compiled_when_called  # type: ignore[attr-defined]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Put the finder in front of Python's own, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
