"""The datatrove pipeline writes the same files as tools/preprocess_data.py, and submits two SLURM jobs."""

import os
from pathlib import Path

import pytest

from megatron_mesh.data import build_tokenizer
from megatron_mesh.data.preprocess import PreprocessSettings, preprocess
from tests.unit.data.corpora import sentences, write_jsonl

pytest.importorskip("datatrove", reason="datatrove, an optional dependency, is not installed")


@pytest.mark.parametrize("model", ["hf_model", "sp_model"])
def test_same_files_as_on_one_machine(tmp_path: Path, run_tool, model: str, request) -> None:
    tokenizer_model = request.getfixturevalue(model)
    files = [write_jsonl(tmp_path / f"{i}.jsonl", ["", *sentences(40, seed=i)]) for i in range(3)]
    command = ["--input", *files, "--output-prefix", str(tmp_path / "there"), "--append-eod", "--tasks", "2"]
    assert run_tool("preprocess_datatrove", *command, "--tokenizer-model", tokenizer_model) == 0
    preprocess(
        build_tokenizer(None, tokenizer_model),
        PreprocessSettings(files, str(tmp_path / "here"), append_eod=True),
    )
    for suffix in (".bin", ".idx"):
        here, there = (tmp_path / f"{name}_text_document{suffix}" for name in ("here", "there"))
        assert here.read_bytes() == there.read_bytes()
    assert run_tool("preprocess_datatrove", *command, "--tokenizer-model", tokenizer_model) == 2


def test_slurm_jobs(tmp_path: Path, run_tool, hf_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses an sbatch that only records its calls."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    sbatch = bin_ / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho Submitted batch job 42\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    files = [write_jsonl(tmp_path / f"{i}.jsonl", sentences(5)) for i in range(3)]
    command = ["--input", *files, "--output-prefix", str(tmp_path / "d"), "--tokenizer-model", hf_model]
    command += ["--tasks", "8", "--slurm"]
    assert run_tool("preprocess_datatrove", *command) == 2  # no partition
    assert run_tool("preprocess_datatrove", *command, "--partition", "cpu", "--time", "01:00:00") == 0
    logs = tmp_path / "d_text_document_datatrove" / "logs"
    script = (logs / "encode" / "launch_script.slurm").read_text()
    for line in ("--partition=cpu", "--time=01:00:00", "--array=0-2", "--cpus-per-task=1"):
        assert f"#SBATCH {line}" in script
    assert "--dependency=afterok:42" in (tmp_path / "calls").read_text()
    assert (logs / "join" / "executor.pik").is_file()
