"""Libraries of GPUs that are installed and cannot be used, told to Megatron-core as missing ones.

Megatron-core 0.16.1 takes optimizer, norms of gradients and much else from Transformer Engine, or else from
apex, wherever they can be imported; on a machine without a GPU they can be, and end in the first kernel
(Transformer Engine 2.11: ``multi_tensor_l2norm``). A container for GPUs also runs on login nodes.

A Transformer Engine that does not fit ends the import in ways of its own: a missing CUDA library with an
OSError, another torch than it was compiled for with an ImportError, a wrong installation with a RuntimeError
or an AssertionError (``transformer_engine/common/__init__.py``). Megatron-core imports it in many places and
catches ImportError alone, in one place ModuleNotFoundError (``tensor_parallel/random.py``).
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
        """The module as Python finds it; running it raises ModuleNotFoundError in place of ``BROKEN``."""
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
    """Put it in front of Python's own finders, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
