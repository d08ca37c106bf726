"""Without triton or a GPU the package can be imported, reports what is missing, and handles float64."""

import importlib
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import megatron_mesh
from megatron_mesh.kernels import availability, available, why_unavailable
from megatron_mesh.runtime import device


def test_imports_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_mesh, "kernels", megatron_mesh.kernels)  # restored afterwards
    for name in [name for name in sys.modules if name.startswith("megatron_mesh.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    fresh = importlib.import_module("megatron_mesh.kernels")
    assert not fresh.available()
    x = torch.ones(1, 1, 2, dtype=torch.float64)
    assert fresh.weighted_sum(2 * x[..., :1], [x]).tolist() == [[[2.0, 2.0]]]
    with pytest.raises(ImportError, match="triton"):
        fresh.weighted_sum(torch.ones(1, 1, 1), [torch.ones(1, 1, 2)])


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Simulate a machine on which nothing is missing."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(availability, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.delenv("CC", raising=False)
    return monkeypatch


def test_available_if_nothing_is_missing(complete: pytest.MonkeyPatch) -> None:
    assert why_unavailable() is None
    assert available()


def test_finds_the_headers_of_debians_python(complete: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its default scheme, posix_local, points to /usr/local/include, which has no headers."""
    paths = {"posix_local": {"include": "/nowhere"}, "posix_prefix": {"include": str(tmp_path)}}
    complete.setattr(sysconfig, "get_default_scheme", lambda: "posix_local")
    complete.setattr(sysconfig, "get_paths", lambda scheme="posix_local": paths[scheme])
    assert available()


def test_reports_what_is_missing(complete: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with complete.context() as patch:
        patch.setattr(device, "has_gpu", lambda: False)
        assert why_unavailable() == "there is no GPU"
    with complete.context() as patch:
        patch.setattr(availability, "find_spec", lambda name: None)
        assert why_unavailable() == "triton is not installed"
    with complete.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        assert "C compiler" in (why_unavailable() or "")
        patch.setenv("CC", "/opt/cc")
        assert available()
    (tmp_path / "Python.h").unlink()
    assert "python3-dev" in (why_unavailable() or "")
    assert not available()
