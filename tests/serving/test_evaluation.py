"""``tools/evaluate.py --engine vllm`` gives the same scores as ``--engine transformers``."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.evaluation.samples import sentence, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def run(cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(cwd / "cache")}
    command = [sys.executable, str(ROOT / "tools/evaluate.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400)


def finished(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "results.json").read_text(encoding="utf-8"))["finished"])


@pytest.mark.parametrize("scheme,option", [("mesh", "--model"), ("base", "--load")])
def test_equal_scores(
    export: Callable[[str], Path],
    checkpoint: Callable[[str], Path],
    local_data: Path,
    tmp_path: Path,
    scheme: str,
    option: str,
) -> None:
    """For multiple choice, last words, and packed text with windows as long as the model's sequences."""
    where = (export if option == "--model" else checkpoint)(scheme)
    text = tmp_path / "valid.jsonl.gz"
    write_jsonl(text, [{"text": sentence(i, 40 * i + 1)} for i in range(8)])
    asked = ["--tasks", "piqa", "arc_easy", "lambada_openai", "--num-fewshot", "0", "5", "--text", text]
    for engine in ("transformers", "vllm"):
        arguments = [option, where, "--engine", engine, "--dtype", "float32", "--local-data", local_data]
        done = run(tmp_path, *arguments, *asked, "--output-dir", engine)
        assert done.returncode == 0, done.stderr[-4000:]
    plain, served = finished(tmp_path / "transformers"), finished(tmp_path / "vllm")
    assert plain.keys() == served.keys() and len(plain) == 5  # ARC and LAMBADA have no data for 5 shots
    for label, result in plain.items():
        assert result["documents"] == served[label]["documents"]
        for name, value in result["metrics"].items():
            tolerance = 0.0 if name.startswith("acc") else 1e-3
            assert served[label]["metrics"][name] == pytest.approx(value, rel=tolerance), (label, name)
    assert plain["text valid.jsonl.gz"]["metrics"]["tokens"] > 2 * 256

    mixed = run(tmp_path, option, where, "--dtype", "float32", *asked, "--output-dir", "vllm")
    assert mixed.returncode == 2 and "different run (engine: vllm there, transformers here)" in mixed.stderr


def test_refusals(export: Callable[[str], Path], tmp_path: Path) -> None:
    """A device and foreign code are each rejected with a message of one line."""
    text = tmp_path / "valid.txt"
    text.write_text("a few words\n")
    model = write_copy(export("mesh"), tmp_path / "mine")
    always = ["--engine", "vllm", "--tasks", "--text", text, "--output-dir", "out", "--model", model]
    device = run(tmp_path, *always, "--device", "cpu")
    code = model / "mesh.py"
    code.write_text(code.read_text(encoding="utf-8") + "raise RuntimeError('run')\n", encoding="utf-8")
    changed = run(tmp_path, *always)
    for done, message in (
        (device, "--device cpu is only for --engine transformers"),
        (changed, "--refresh-code"),
    ):
        assert done.returncode == 2, done.stderr
        assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def write_copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    return target
