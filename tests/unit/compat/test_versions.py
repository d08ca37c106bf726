"""Packages with the wrong version are reported before anything imports them."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import pretrain_mesh
from megatron_mesh.compat.versions import SUPPORTED, check_versions, fits
from megatron_mesh.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def install(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    given = {"megatron-core": "0.16.1", "torch": "2.10.0"}
    given |= {name.replace("_", "-"): version for name, version in versions.items()}

    def version(name: str) -> str:
        if given.get(name) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return given[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_what_is_installed_here_fits() -> None:
    check_versions()


@pytest.mark.parametrize(
    "versions",
    [
        {},
        {"torch": "2.10.0a0+b4e4ee8"},
        {"transformer_engine": "2.9.0+70f536"},
        {"transformer_engine": "2.13"},
    ],
)
def test_versions_that_fit(monkeypatch, versions: dict[str, str]) -> None:
    install(monkeypatch, **versions)
    check_versions()


@pytest.mark.parametrize(
    "versions, words",
    [
        (
            {"megatron_core": "0.15.2"},
            "megatron-core 0.15.2 is installed, but ==0.16.1 is needed; run: pip install '",
        ),
        ({"megatron_core": "0.17.0"}, "pip install 'megatron-core==0.16.1'"),
        ({"megatron_core": None}, "megatron-core is not installed (==0.16.1 is needed); run: pip install '"),
        ({"torch": "2.8.0"}, "torch 2.8.0 is installed, but >=2.9,<2.14 is needed"),
        ({"torch": "2.14.0"}, "pip install 'torch>=2.9,<2.14'"),
        ({"transformer_engine": "2.8.0"}, "or to train without it: pip uninstall transformer-engine"),
    ],
)
def test_versions_that_do_not_fit(monkeypatch, versions: dict[str, str | None], words: str) -> None:
    install(monkeypatch, **versions)
    with pytest.raises(UserError, match=re.escape(words)):
        check_versions()


def test_a_run_checks_before_it_imports(monkeypatch) -> None:
    install(monkeypatch, megatron_core="0.15.0")
    monkeypatch.setattr(pretrain_mesh, "resolve", lambda config, world_size: config)
    with pytest.raises(UserError, match=r"megatron-core 0\.15\.0 is installed"):
        pretrain_mesh.main([])


def test_the_package_asks_for_the_same() -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    asked = re.findall(r'"([\w-]+)(?:\[[\w,]+\])?((?:[=<>!]=?[\d.]+,?)+)"', text)
    asked = {name: SpecifierSet(wanted) for name, wanted in asked if name in SUPPORTED}
    assert asked == {name: SpecifierSet(wanted) for name, wanted in SUPPORTED.items()}


def test_prereleases_fit() -> None:
    assert fits("2.10.0a0+git", ">=2.9,<2.14") and not fits("2.14.0", ">=2.9,<2.14")
