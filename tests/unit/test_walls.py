"""The walls between the folders, read from the sources."""

import ast
import re
from pathlib import Path

import megatron_mesh

PACKAGE = Path(megatron_mesh.__file__).parent
ROOT = PACKAGE.parent
SOURCES = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").rglob("*.py"), ROOT / "pretrain_mesh.py"]


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
    """The house's limits: 400 lines a file, 60 a function."""
    for path in SOURCES:
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
