"""The report of what is installed."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from megatron_mesh.runtime import device, environment_report
from megatron_mesh.runtime.environment_report import OPTIONAL, REQUIRED, report

ROOT = Path(__file__).resolve().parents[3]


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


def test_the_tool() -> None:
    command = [sys.executable, str(ROOT / "tools/env_report.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "megatron-core" in done.stdout, done.stderr
