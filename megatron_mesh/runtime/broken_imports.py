"""A Transformer Engine that is installed and cannot be loaded, told to Megatron-core as one that is missing.

A missing CUDA library ends the import with an OSError, another torch than it was compiled for with an
ImportError, a wrong installation with a RuntimeError or an AssertionError
(``transformer_engine/common/__init__.py``). Megatron-core 0.16.1 imports it in many places and catches
ImportError alone, in one place ModuleNotFoundError (``tensor_parallel/random.py``): without this, planning on
a login node would end in a traceback.
``model/implementation.py`` decides what such an installation means for a run.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

BROKEN = (ImportError, OSError, RuntimeError, AssertionError)
_NAMES = ("transformer_engine", "transformer_engine.pytorch")


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module as Python finds it; running it raises ModuleNotFoundError in place of ``BROKEN``."""
        if fullname not in _NAMES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            try:
                execute(module)
            except BROKEN as error:
                raise ModuleNotFoundError(str(error), name=fullname) from error

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Put it in front of Python's own finders, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
