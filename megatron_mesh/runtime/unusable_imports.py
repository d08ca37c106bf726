"""Hide GPU libraries that are installed but unusable from Megatron-core.

Megatron-core 0.16.1 takes the optimizer, gradient norms and much else from Transformer Engine or apex if they
can be imported. On a machine without a GPU the import succeeds, and the first kernel fails (Transformer
Engine 2.11: ``multi_tensor_l2norm``). This matters because a GPU container also runs on login nodes.

A Transformer Engine that doesn't fit fails to import in different ways: with an OSError if a CUDA library is
missing, an ImportError if it was compiled for another torch, a RuntimeError or AssertionError if it is badly
installed (``transformer_engine/common/__init__.py``). Megatron-core imports it in many places and catches
only ImportError, in one place only ModuleNotFoundError (``tensor_parallel/random.py``).
``model/implementation.py`` decides what such an installation means for a run.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

BROKEN = (ImportError, OSError, RuntimeError, AssertionError)
_NAMES = ("transformer_engine", "transformer_engine.pytorch", "apex", "amp_C")


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the module as Python does. Running it raises ModuleNotFoundError instead of ``BROKEN``."""
        if fullname not in _NAMES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            from megatron_mesh.runtime import device  # imports torch, which may be broken itself

            try:
                if not device.has_gpu():
                    raise ModuleNotFoundError("there is no GPU")
                execute(module)
            except BROKEN as error:
                raise ModuleNotFoundError(str(error), name=fullname) from error

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Put the finder in front of Python's own, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
