"""Rules of the house that hold for every source file."""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_mesh

PACKAGE = Path(megatron_mesh.__file__).parent
ROOT = PACKAGE.parent
SOURCES = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").rglob("*.py"), ROOT / "pretrain_mesh.py"]

FOLDERS = (
    *(
        "errors",
        "recurrence",
        "config",
        "compat",
        "runtime",
        "kernels",
        "data",
        "model",
        "metrics",
        "parallel",
    ),
    *("checkpoint", "train", "planner", "hf", "evaluation", "environment_report", "command", "arguments"),
    *("slurm", "faults", "__main__"),
)
"""Folders and modules of the package from the bottom up: each imports only from those before it."""

SAME_NAME = {
    "mixing": "the sum over slots, in torch (recurrence) and in Triton (kernels)",
    "versions": "supported versions of packages (compat), and of transformers for exports (hf/modeling)",
}
"""Modules of one name in two folders, which are one idea in two places."""

SAME_PUBLIC_NAME = {
    "main": "the entry point of a module that runs as a program",
    "weighted_sum": "kernels.mixing replaces recurrence.mixing on a GPU",
}
"""Public functions of one name in two modules, which are interchangeable."""


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported(name: str, *, type_checking: bool = False) -> Iterator[str]:
    """The package's modules that module ``name`` imports, at its top or in a function."""
    tree = ast.parse(MODULES[name].read_text())
    base = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    skipped = set()
    for node in ast.walk(tree):
        if not type_checking and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= set(ast.walk(node))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = base.split(".")[: len(base.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            candidates = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for candidate in candidates:
            while candidate and candidate not in MODULES:
                candidate = candidate.rpartition(".")[0]
            if candidate and candidate != name:
                yield candidate


def test_cuda_is_named_in_one_file() -> None:
    pattern = re.compile(r"torch\.cuda|\.cuda\(|[\"']cuda")
    named = {p.relative_to(ROOT).as_posix() for p in SOURCES if pattern.search(p.read_text())}
    assert named == {"megatron_mesh/runtime/device.py"}


def test_the_package_does_not_import_tools() -> None:
    pattern = re.compile(r"^\s*(from|import) tools\b", re.MULTILINE)
    assert not [p for p in PACKAGE.rglob("*.py") if pattern.search(p.read_text())]


def test_stage_predicates_only_in_parallel() -> None:
    pattern = re.compile(
        r"is_pipeline_(first|last)_stage|is_pp_(first|last)_stage|get_pipeline_model_parallel_rank"
    )
    for path in SOURCES:
        if pattern.search(path.read_text()):
            assert path.parent == PACKAGE / "parallel", path


def test_no_global_arguments() -> None:
    assert not [p for p in SOURCES if "get_args()" in p.read_text()]


def test_file_and_function_sizes() -> None:
    """At most 600 lines a file, 60 a function."""
    for path in SOURCES:
        text = path.read_text()
        assert len(text.splitlines()) <= 600, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_imports_run_downwards() -> None:
    upwards = [
        f"{name} imports {target}"
        for name in MODULES
        for target in imported(name)
        if name != "megatron_mesh" != target
        and FOLDERS.index(target.split(".")[1]) > FOLDERS.index(name.split(".")[1])
    ]
    assert not upwards, "\n".join(upwards)


def test_no_import_circles() -> None:
    """Importing a module never needs the module itself, not even in a function."""
    edges = {name: set(imported(name)) for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in edges[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_shipped_code_imports_torch_and_transformers_alone() -> None:
    """``hf/modeling`` and ``recurrence`` travel with exports to machines without this package."""
    allowed = {"torch", "transformers", "megatron_mesh.hf.modeling", "megatron_mesh.recurrence"}
    optional = {"sentencepiece", "packaging"}
    for name, path in MODULES.items():
        if not name.startswith(("megatron_mesh.hf.modeling", "megatron_mesh.recurrence")):
            continue
        standard = sys.stdlib_module_names
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for found in names:
                top = found.split(".")[0]
                ours = any(found == a or found.startswith(a + ".") for a in allowed)
                assert ours or top in standard or top in optional, f"{name} imports {found}"


def test_modules_have_names_of_their_own() -> None:
    places = defaultdict(list)
    for name, path in MODULES.items():
        if path.name != "__init__.py":
            places[path.stem].append(name)
    twice = {stem: names for stem, names in places.items() if len(names) > 1 and stem not in SAME_NAME}
    assert not twice


def test_public_names_are_defined_once() -> None:
    places = defaultdict(list)
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    twice = {name: found for name, found in places.items() if len(found) > 1 and name not in SAME_PUBLIC_NAME}
    assert not twice


PACKAGES = sorted(path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("__init__.py"))


@pytest.mark.parametrize("folder", PACKAGES)
def test_every_folder_says_where_to_start(folder: str) -> None:
    """Its docstring says what comes in and what goes out, and names a file of the folder to start with."""
    directory = PACKAGE / folder
    text = ast.get_docstring(ast.parse((directory / "__init__.py").read_text())) or ""
    named = re.findall(r"``((?:\w+/)*\w+\.(?:py|sh))``", text)
    assert len(text.split()) >= 12, f"{folder}: {text!r}"
    assert any((directory / name).is_file() for name in named), f"{folder} names none of its files"
    for name in named:
        assert any((place / name).is_file() for place in (directory, PACKAGE, ROOT)), f"{folder}: {name}"
