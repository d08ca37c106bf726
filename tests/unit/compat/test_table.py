"""The table of dependences on other packages' internals is complete, and nothing else depends on them."""

import ast
import functools
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_mesh import compat
from megatron_mesh.compat.table import TABLE, Dependence

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "megatron_mesh"
OURS = {"__init__", "changes", "table", "versions"}
"""Modules of compat that depend on no internals."""

SHIPPED = {"configuration_mesh.py", "layers_mesh.py", "modeling_mesh.py", "tokenization_mesh.py"}
"""Exports carry these files, so they import torch and transformers alone."""
SOURCES = [
    path
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tools").rglob("*.py"), ROOT / "pretrain_mesh.py"]
    if path.parent != PACKAGE / "compat" and path.name not in SHIPPED
]
NOT_PRIVATE = {"_replace", "_asdict", "_fields", "_make", "_exit", "_ArgumentGroup"}
"""Names of the standard library: documented ones, and a type of argparse that has no other name."""


def public_names() -> Iterator[str]:
    for info in pkgutil.iter_modules(compat.__path__):
        if info.name in OURS:
            continue
        tree = ast.parse((Path(compat.__path__[0]) / f"{info.name}.py").read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            names += [target.id for target in targets if isinstance(target, ast.Name)]
            if isinstance(node, ast.Assign) and names[-1] == "__all__":
                names += ast.literal_eval(node.value)
        yield from (f"{info.name}.{name}" for name in dict.fromkeys(names) if not name.startswith("_"))


def test_every_public_name_has_a_row() -> None:
    rows = [row.name for row in TABLE]
    assert len(rows) == len(set(rows))
    assert {name for name in rows if ":" not in name} == set(public_names())


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_row_names_what_exists(row: Dependence) -> None:
    if ": " in row.name:
        path, name = row.name.split(": ")
        assert name in (ROOT / path).read_text(encoding="utf-8")
    else:
        module, name = row.name.split(".")
        assert hasattr(importlib.import_module(f"{compat.__name__}.{module}"), name)
    path, test = row.test.split("::")
    assert re.search(rf"^def {test}\(", (ROOT / path).read_text(encoding="utf-8"), re.M), row.test
    assert row.supported and row.why and row.internal


def is_private(dotted: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def is_own_attribute(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) in ("self", "cls")
    )


@functools.cache
def own_names() -> set[str]:
    """Every name that this package defines, as a function, class, variable or attribute of ``self``."""
    names = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif is_own_attribute(node):
                names.add(node.attr)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_compat_uses_private_names_of_other_packages(path: Path) -> None:
    allowed = own_names() | NOT_PRIVATE
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("megatron_mesh"):
            names = [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and node.attr not in allowed:
            names = [node.attr]
        else:
            continue
        private = [name for name in names if is_private(name)]
        assert not private, f"line {node.lineno}: {private}; use or add a function in megatron_mesh/compat"
        assert "sys.meta_path" not in ast.unparse(node), f"line {node.lineno}"


def test_only_compat_overrides_private_methods_of_other_packages() -> None:
    """A method that starts with an underscore, in a subclass, may replace one of the base class."""
    found = []
    for path in SOURCES:
        if not path.is_relative_to(PACKAGE) or path.name in ("layers_te.py", "vllm_lm.py"):
            continue  # these need packages that may be missing
        text = path.read_text(encoding="utf-8")
        classes = [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
        if not classes or path.name.startswith("__") or path.name == "preload.py":
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for each in (getattr(importlib.import_module(module), name) for name in classes):
            foreign = [base for base in each.__mro__[1:-1] if is_package(base.__module__)]
            found += [
                f"{module}.{each.__name__}.{name}"
                for name, value in vars(each).items()
                if is_private(name)
                and callable(value)
                and not isinstance(value, type)
                and any(name in vars(base) for base in foreign)
            ]
    assert not found


def is_package(module: str) -> bool:
    """Whether a class comes from a package whose internals may change."""
    return module.split(".")[0] in ("megatron", "torch", "transformers", "lm_eval", "vllm", "datatrove")
