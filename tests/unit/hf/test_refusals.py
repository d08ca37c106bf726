"""Models that the conversion rejects for reasons other than config.json, and what it converts exactly."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXForCausalLM

from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert.export import export_checkpoint
from megatron_mesh.hf.convert.import_model import import_model
from tests.unit.hf.test_bring_in import ROOT, stock
from tests.unit.hf.test_logits import weights_of


def refused(directory: Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_model(directory, directory.parent / "out")
    assert not list(directory.parent.glob("out*"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    stock(tmp_path / "stock", num_hidden_layers=2)
    return tmp_path / "stock"


def change_weights(directory: Path, changes: dict[str, torch.Tensor]) -> None:
    path = directory / "model.safetensors"
    save_file({**load_file(path), **changes}, path, metadata={"format": "pt"})


DENSE = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float64, "F64"),
        (torch.bool, "BOOL"),
    ],
)
def test_quantized_weights(directory: Path, dtype: torch.dtype, name: str) -> None:
    """With their scales next to them, and without, since some libraries store scales in another file."""
    change_weights(directory, {DENSE: torch.ones(128, 32).to(dtype)})
    refused(directory, f"dense_h_to_4h.weight has dtype {name}; only weights in float32")
    change_weights(directory, {f"{DENSE}_scale": torch.ones(128)})
    refused(directory, r"config\.json doesn't account for .*first: .*dense_h_to_4h\.weight_scale\)")


def test_quantized_weights_in_torch_files(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save({**weights, DENSE: weights[DENSE].to(torch.int8)}, directory / "pytorch_model.bin")
    refused(directory, "dense_h_to_4h.weight has dtype int8; only weights in float32")


def test_more_than_a_plain_model(directory: Path) -> None:
    change_weights(directory, {"gpt_neox.layers.2.mlp.dense_h_to_4h.weight": torch.ones(128, 32)})
    refused(
        directory, r"doesn't account for \(number: 1; first: gpt_neox\.layers\.2\.mlp\.dense_h_to_4h\.weight"
    )
    (directory / "adapter_config.json").write_text("{}")
    refused(directory, "PEFT adapter .*merge it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "gpt_neox", "vocab_size": 1, "vocab_size": 2}', "'vocab_size' occurs twice"),
        ('{"model_type": "gpt_neox", "layer_norm_eps": NaN}', "NaN is not a finite number"),
        ('{"model_type": "gpt_neox", "layer_norm_eps": -Infinity}', "-Infinity is not a finite number"),
        ('{"model_type": "gpt_neox", "layer_norm_eps": 1e999}', "1e999 is not a finite number"),
        ("[" * 100_000, "cannot read"),
    ],
)  # fmt: skip
def test_ambiguous_json(directory: Path, text: str, message: str) -> None:
    (directory / "config.json").write_text(text)
    refused(directory, message)


def test_buffers_of_old_versions_are_ignored(directory: Path, tmp_path: Path) -> None:
    masks = {"attention.bias": torch.ones(1, 1, 4, 4).bool(), "attention.masked_bias": torch.tensor(-1e9)}
    masks["attention.rotary_emb.inv_freq"] = torch.ones(1)
    change_weights(directory, {f"gpt_neox.layers.1.{name}": buffer for name, buffer in masks.items()})
    import_model(directory, tmp_path / "out")


def test_weight_files_are_chosen_as_in_transformers(directory: Path, tmp_path: Path) -> None:
    """An index that an earlier save left behind is ignored."""
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    (directory / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "gone.bin"}}')
    import_model(directory, tmp_path / "out")
    export_checkpoint(tmp_path / "out", tmp_path / "back")
    before, after = (GPTNeoXForCausalLM.from_pretrained(place) for place in (directory, tmp_path / "back"))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_tied_weights_that_differ(tmp_path: Path) -> None:
    """transformers 4 uses the embedding for both, version 5 uses each one."""
    directory = tmp_path / "stock"
    stock(directory, tie_word_embeddings=True)
    embedding = load_file(directory / "model.safetensors")["gpt_neox.embed_in.weight"]
    change_weights(directory, {"embed_out.weight": embedding + 1})
    refused(directory, r"ties embed_out\.weight to the embedding, but the two differ")
    change_weights(directory, {"embed_out.weight": embedding})
    import_model(directory, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(directory: Path, tmp_path: Path, capsys: Any, dtype: torch.dtype) -> None:
    """A single dtype is preserved. Several become float32, which represents all of them exactly."""
    weights = {name: tensor.to(dtype) for name, tensor in load_file(directory / "model.safetensors").items()}
    change_weights(directory, weights)
    import_model(directory, tmp_path / "out")
    assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} == {dtype}
    assert ("keeps the weights in float16" in capsys.readouterr().err) == (dtype == torch.float16)
    norm = torch.linspace(0.1, 0.9, 32)
    change_weights(directory, {"gpt_neox.final_layer_norm.weight": norm})
    import_model(directory, tmp_path / "mixed")
    mixed = weights_of(tmp_path / "mixed")
    assert {tensor.dtype for tensor in mixed.values()} == {torch.float32}
    assert torch.equal(mixed["decoder.final_layernorm.weight"], norm)
    assert torch.equal(mixed["decoder.layers.mlp.linear_fc1.weight"][1], weights[DENSE].float())


def test_output_of_the_tool(directory: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """A refusal is one line and exit code 2. Ignored dropout is reported."""
    path = directory / "config.json"
    good = json.loads(path.read_text())
    arguments = ["convert_from_hf.py", "--load", str(directory), "--save", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    path.write_text(json.dumps({**good, "rope_scaling": {"type": "linear", "factor": 2.0}}))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "tools/convert_from_hf.py"), run_name="__main__")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: rope_scaling is ")
    path.write_text(json.dumps({**good, "hidden_dropout": 0.1, "attention_dropout": 0.2}))
    runpy.run_path(str(ROOT / "tools/convert_from_hf.py"), run_name="__main__")
    printed = capsys.readouterr().err
    assert "note: ignored hidden_dropout 0.1 and attention_dropout 0.2" in printed
