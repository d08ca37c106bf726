"""A training checkpoint, straight and by way of its export."""

import os
import runpy
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")

import datasets
from transformers import dynamic_module_utils

from megatron_mesh.errors import UserError
from megatron_mesh.evaluation.results import Results, open_results
from megatron_mesh.hf.export import export_checkpoint
from tests.exports import saved_with_logits

ROOT = Path(__file__).resolve().parents[3]
main = runpy.run_path(str(ROOT / "tools/evaluate.py"))["main"]


def read(directory: Path) -> Results:
    return open_results(directory, {})


def test_checkpoint_and_export_measure_the_same(
    model_dir: Path, local_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that the export brings runs only if that is asked for; nothing of the conversion stays."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    checkpoint, _ = saved_with_logits(
        tmp_path / "run", vocab_size=352, seq_length=48, tokenizer_model=str(model_dir / "tokenizer.json")
    )
    export_checkpoint(checkpoint, tmp_path / "exported")
    (tmp_path / "valid.txt").write_text("the cat sat on a mat " * 30)
    rest = ["--local-data", str(local_data), "--text", str(tmp_path / "valid.txt"), "--device", "cpu"]
    main(["--load", str(checkpoint.parent), "--output-dir", str(tmp_path / "a"), *rest])
    assert sorted(os.listdir(tmp_path / "a")) == ["results.json", "results.md"]

    direct = ["--model", str(tmp_path / "exported"), "--output-dir", str(tmp_path / "b"), *rest]
    with pytest.raises(UserError, match=r"auto_map .*--trust-remote-code"):
        main(direct)
    main([*direct, "--trust-remote-code"])
    ours, theirs = read(tmp_path / "a").finished, read(tmp_path / "b").finished
    assert len(ours) == 5 and ours.keys() == theirs.keys()
    for label, result in ours.items():
        assert result.metrics == pytest.approx(theirs[label].metrics, rel=1e-6), label
