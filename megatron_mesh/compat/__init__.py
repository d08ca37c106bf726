"""Every dependence on the internals of Megatron-core, torch and other packages, listed in ``table.py``.

Other folders use the functions and base classes of this one instead of names that start with an underscore.
An upgrade of a package therefore starts, and mostly ends, here. Start reading in ``table.py``.

Importing ``megatron_mesh`` changes nothing outside of it. A program that runs a model calls ``install()``
before its first import of Megatron-core; without it everything works, but imports are slower and print
warnings::

    from megatron_mesh import compat

    compat.check_versions()
    compat.install()          # or, for a part of a program: with compat.installed(): ...
    from megatron_mesh.train import pretrain
"""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_mesh.compat import changes, imports
from megatron_mesh.compat.versions import check_versions

__all__ = ["check_versions", "install", "installed", "uninstall"]


def install() -> None:
    """Prepare this process for Megatron-core, before anything imports it. A second call has no effect.

    Hides GPU libraries that cannot be used here, defers loading torch's compiler, and silences messages of
    Megatron-core that ``runtime/device.py: describe`` replaces by one line.
    """
    changes.make("messages", imports.silence)
    changes.make("imports", imports.hook)


def uninstall() -> None:
    """Take back all process-wide changes: those of ``install`` and those of ``runtime/device.py: prepare``.

    Modules that are already imported stay as they are.
    """
    changes.take_back_all()


@contextmanager
def installed() -> Iterator[None]:
    """Call ``install`` on entry and ``uninstall`` on exit."""
    install()
    try:
        yield
    finally:
        uninstall()
