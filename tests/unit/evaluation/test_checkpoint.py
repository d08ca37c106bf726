"""A training checkpoint and its export give the same results."""

import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")

import datasets
from transformers import dynamic_module_utils

from megatron_mesh.errors import UserError
from megatron_mesh.evaluation import model_source
from megatron_mesh.evaluation.model_source import _OUR_MODEL_TYPE
from megatron_mesh.evaluation.results import Results, open_results
from megatron_mesh.hf.convert.export import export_checkpoint
from tests.commands import tool
from tests.exports import saved_with_logits

main = tool("evaluate")


def read(directory: Path) -> Results:
    return open_results(directory, {})


def test_checkpoint_and_export_measure_the_same(
    model_dir: Path, local_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code in the export is not run. The package's own code runs instead."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copy(model_dir / "tokenizer.json", tmp_path)
    checkpoint, _ = saved_with_logits(
        tmp_path / "run", vocab_size=352, seq_length=48, tokenizer_model=str(tmp_path / "tokenizer.json")
    )
    export_checkpoint(checkpoint, tmp_path / "exported")
    (tmp_path / "valid.txt").write_text("the cat sat on a mat " * 30)
    rest = ["--local-data", str(local_data), "--text", str(tmp_path / "valid.txt"), "--device", "cpu"]
    main(["--load", str(checkpoint.parent), "--output-dir", str(tmp_path / "a"), *rest])
    assert sorted(os.listdir(tmp_path / "a")) == ["results.json", "results.md"]

    again = ["--load", str(checkpoint.parent), "--output-dir", str(tmp_path / "a"), *rest]
    moved = shutil.copy(model_dir / "tokenizer.json", tmp_path / "moved.json")
    with monkeypatch.context() as patch:
        patch.setattr(model_source, "opened", None)  # all results exist, so the model is not loaded
        main([*again, "--tokenizer-model", str(moved)])
    named = tmp_path / "tokenizer.json"
    named.write_text(named.read_text() + " ")
    with pytest.raises(UserError, match=r"results of a different run \(model: "):
        main(again)
    named.unlink()
    with pytest.raises(UserError, match=r"cannot load the run's tokenizer .* --tokenizer-model"):
        main(again)

    exported = tmp_path / "exported"
    config = json.loads((exported / "config.json").read_text())
    assert "auto_map" in config and config["model_type"] == _OUR_MODEL_TYPE
    (exported / "modeling_mesh.py").write_text("raise AssertionError('code of the directory was run')")
    main(["--model", str(exported), "--output-dir", str(tmp_path / "b"), *rest])
    ours, theirs = read(tmp_path / "a").finished, read(tmp_path / "b").finished
    assert len(ours) == 5 and ours.keys() == theirs.keys()
    for label, result in ours.items():
        assert result.metrics == pytest.approx(theirs[label].metrics, rel=1e-6), label


def test_code_of_others_runs_only_if_asked_for(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = Path(shutil.copytree(model_dir, tmp_path / "stranger"))
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "configuration_stranger.Config"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "configuration_stranger.py").write_text("raise AssertionError('it was run')")
    (tmp_path / "valid.txt").write_text("the cat")
    flags = ["--model", str(directory), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    flags += ["--tasks", "--text", str(tmp_path / "valid.txt")]
    with pytest.raises(UserError, match=r"auto_map \(AutoConfig\).*--trust-remote-code"):
        main(flags)
    with pytest.raises(AssertionError, match="it was run"):
        main([*flags, "--trust-remote-code"])
