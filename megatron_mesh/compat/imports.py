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

from types import ModuleType

from megatron_mesh.compat.import_hook import Execute, run_instead

BROKEN = (ImportError, OSError, RuntimeError, AssertionError)
_NAMES = ("transformer_engine", "transformer_engine.pytorch", "apex", "amp_C")


def install() -> None:
    """Turn any of ``BROKEN`` into a ModuleNotFoundError when one of these libraries is imported."""
    run_instead(_NAMES, _run)


def _run(execute: Execute, module: ModuleType) -> None:
    from megatron_mesh.runtime import device  # imports torch, which may be broken itself

    try:
        if not device.has_gpu():
            raise ModuleNotFoundError("there is no GPU")
        execute(module)
    except BROKEN as error:
        raise ModuleNotFoundError(str(error), name=module.__name__) from error
