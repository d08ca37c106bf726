"""The report of what is installed."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mesh import environment_report
from megatron_mesh.environment_report import OPTIONAL, REQUIRED, report
from megatron_mesh.model import implementation
from megatron_mesh.runtime import device
from tests.commands import tool

ROOT = Path(__file__).resolve().parents[2]
NO_FP8 = "the GPU (sm_80) has no FP8; it needs sm_89 (Ada), sm_90 (Hopper) or newer"


def test_every_part_is_there_with_its_version_or_what_its_lack_costs(monkeypatch) -> None:
    rows = {row.what: row for row in report()}
    for name in REQUIRED:
        assert rows[name].found == importlib.metadata.version(name)
    for name, cost in OPTIONAL.items():
        assert (rows[name].note == cost) == (rows[name].found == "missing")
    if not device.has_gpu():
        assert rows["GPU"].found == "none" and "gloo" in rows["GPU"].note
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setattr(environment_report, "REQUIRED", ("no-such-package",))
    rows = {row.what: row for row in report()}
    assert rows["$NCCL_DEBUG"].found == "INFO"
    assert rows["no-such-package"].found == "MISSING"


def layers() -> dict[str, tuple[str, str]]:
    return {row.what: (row.found, row.note) for row in report() if row.what in ("layers", "FP8")}


def test_layers_and_fp8_where_transformer_engine_cannot_be_used(monkeypatch) -> None:
    """Installed is not enough: what keeps it from working is said."""
    monkeypatch.setattr(environment_report, "_version", lambda name: "2.11.0")
    monkeypatch.setattr(implementation, "why_no_transformer_engine", lambda: "libcudart.so cannot be loaded")
    assert layers()["layers"] == ("torch's", "libcudart.so cannot be loaded")
    assert layers()["FP8"][0] == "no"
    monkeypatch.setattr(implementation, "why_no_transformer_engine", lambda: None)
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    assert layers()["layers"] == ("torch's", "there is no GPU")


@pytest.mark.parametrize(
    "version,capability,note,fp8",
    [
        ("2.10.0+769ed7787", (9, 0), "", ("yes", "")),
        ("2.12.0", (9, 0), "megatron-core is tested with >=2.9,<2.12", ("yes", "")),
        (
            "2.11.0",
            (8, 0),
            "",
            ("no", "the GPU (sm_80) has no FP8; it needs sm_89 (Ada), sm_90 (Hopper) or newer"),
        ),
    ],
)
def test_layers_and_fp8_with_transformer_engine(monkeypatch, version, capability, note, fp8) -> None:
    installed = environment_report._version
    monkeypatch.setattr(implementation, "why_no_transformer_engine", lambda: None)
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "gpus", lambda: [("H100", "80 GiB")])
    monkeypatch.setattr(device, "libraries", lambda: {"NCCL": "2.28.9"})
    monkeypatch.setattr(device.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(device.torch.cuda, "get_device_capability", lambda index: (capability, (9, 0))[index])
    monkeypatch.setattr(
        environment_report, "_version", lambda n: version if n == "transformer-engine" else installed(n)
    )
    assert layers() == {"layers": ("Transformer Engine's", note), "FP8": fp8}
    rows = {row.what: row.found for row in report()}
    assert (rows["GPU 0"], rows["NCCL"], rows["transformer-engine"]) == ("H100", "2.28.9", version)


def test_the_tool_fails_where_something_needed_is_missing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(environment_report, "REQUIRED", ("torch", "no-such-package"))
    main = tool("env_report")
    with pytest.raises(SystemExit, match="no-such-package missing"):
        main([])
    assert "no-such-package" in capsys.readouterr().out


def test_the_tool() -> None:
    command = [sys.executable, str(ROOT / "tools/env_report.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "megatron-core" in done.stdout, done.stderr


def test_what_is_needed_is_what_the_package_asks_for() -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    needed = re.search(r"install_requires=\[(.*?)\n    \]", text, re.S)
    assert needed and set(REQUIRED) == set(re.findall(r'^\s+"([\w-]+)[>=<]', needed[1], re.M))


@pytest.mark.parametrize("error", ["ModuleNotFoundError", "OSError"])
def test_a_torch_that_cannot_be_imported_is_reported(tmp_path: Path, error: str) -> None:
    (tmp_path / "torch.py").write_text(f"raise {error}('libcudart.so.13: cannot open')\n")
    command = [sys.executable, str(ROOT / "tools/env_report.py")]
    path = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, env=path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "megatron-core" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: torch cannot be imported (libcudart.so.13: cannot open)")


def test_nvidias_name_of_triton_counts(monkeypatch) -> None:
    class Found:
        version = "3.5.1"

    def distribution(name: str) -> Found:
        if name != "pytorch-triton":
            raise importlib.metadata.PackageNotFoundError
        return Found()

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert environment_report._version("triton") == "3.5.1"
    assert environment_report._version("flash-attn") is None


def test_the_driver_is_named(tmp_path: Path, monkeypatch) -> None:
    """As Linux shows it, for the open kernel modules."""
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)\n"
    )
    monkeypatch.setattr(environment_report, "_DRIVER", tmp_path / "version")
    assert {row.what: row.found for row in report()}["NVIDIA driver"] == "580.95.05"
