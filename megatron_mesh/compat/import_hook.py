"""Replace the way in which certain modules of other packages are imported."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

Execute = Callable[[ModuleType], None]
"""Runs a module that Python has found."""


class _Finder(MetaPathFinder):
    def __init__(self, names: Sequence[str], run: Callable[[Execute, ModuleType], None]):
        self.names, self.run = names, run

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the module as Python does."""
        if fullname not in self.names:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: self.run(execute, module)  # type: ignore[method-assign]
        return spec


def run_instead(names: Sequence[str], run: Callable[[Execute, ModuleType], None]) -> None:
    """Import the modules ``names`` by ``run(execute, module)``, which may call ``execute(module)``."""
    sys.meta_path.insert(0, _Finder(names, run))
