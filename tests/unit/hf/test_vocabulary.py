"""Padded vocabulary rows are not in an export, so they are never sampled. A conversion back restores them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_mesh.checkpoint.offline import open_checkpoint
from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert import tensors
from megatron_mesh.hf.convert.export import export_checkpoint
from megatron_mesh.hf.convert.import_model import import_model
from megatron_mesh.hf.convert.tensors import EMBEDDING, OUTPUT, VOCABULARY
from tests.exports import TOKENS, saved_with_logits
from tests.unit.hf.test_logits import load, weights_of
from tests.unit.hf.tokenizers_of_tests import byte_level, sentencepiece_model

TINY = {"recurrence": "base", "layers": "1+1R2+1", "seq_length": 64}


def comes_back(checkpoint: Path, directory: Path, save: Path) -> bool:
    import_model(directory, save)
    before, after = weights_of(checkpoint), weights_of(save)
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("scheme", ["base", "vanilla"])
def test_no_padded_id_is_sampled(tmp_path, scheme) -> None:
    """With a vocabulary of 512 that is padded to 4,096, and a high temperature."""
    model = sentencepiece_model(tmp_path / "spm", model_type="bpe", normalization_rule_name="identity")
    layers = {"vanilla": "2"}.get(scheme, "1+1R2+1")
    settings = {**TINY, "recurrence": scheme, "layers": layers, "make_vocab_size_divisible_by": 4096}
    checkpoint, _ = saved_with_logits(
        tmp_path / "run", vocab_size=512, tokenizer_model=str(model), **settings
    )
    export_checkpoint(checkpoint, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    ours = load(tmp_path / "hf")
    assert ours.get_output_embeddings().weight.shape[0] == ours.config.vocab_size == len(tokenizer) == 512
    batch = tokenizer(["def f", "return the value of x"] * 32, padding=True, return_tensors="pt")
    drawn = ours.generate(
        **batch, do_sample=True, temperature=2.0, top_k=0, max_new_tokens=32, eos_token_id=None
    )[:, batch["input_ids"].shape[1] :]
    assert drawn.unique().numel() > 400
    assert drawn.max() < 512 and tokenizer.pad_token_id not in drawn
    assert comes_back(checkpoint, tmp_path / "hf", tmp_path / "back")
    # Engines load every safetensors file next to config.json.
    assert (tmp_path / "hf" / tensors.PADDING_FILE).is_file()
    assert not (tmp_path / "hf" / tensors.PADDING_FILE.name).exists()


@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize("scheme", ["mesh", "vanilla"])
@pytest.mark.parametrize(
    ("size", "divisor", "rows", "kept"),
    [
        (402, 16, 403, 14),
        (402, 402, 403, 0),  # no padded rows
        (403, 16, 403, 14),
        (500, 16, 403, 110),  # --vocab-size beyond the tokenizer
    ],
)
def test_a_tokenizer_without_a_padding_token(tmp_path, scheme, untied, size, divisor, rows, kept) -> None:
    tokenizer = byte_level(tmp_path / "tokenizer.json")
    layers = {"vanilla": "2"}.get(scheme, "1+1R2+1")
    settings = {**TINY, "recurrence": scheme, "layers": layers, "make_vocab_size_divisible_by": divisor}
    checkpoint, logits = saved_with_logits(
        tmp_path / "run", vocab_size=size, tokenizer_model=str(tokenizer),
        untie_embeddings_and_output_weights=untied, **{**settings, "seq_length": 16},
    )  # fmt: skip
    export_checkpoint(checkpoint, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["vocab_size"], config["pad_token_id"], config["eos_token_id"]) == (rows, 402, 0)
    model = load(tmp_path / "hf")
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits[..., :402], logits[..., :402], atol=1e-5)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        # Some engines ignore suppress_tokens, but a mean row never has the highest logit.
        assert torch.allclose(module.weight[402], module.weight[:402].mean(0), atol=1e-5)
    path = tmp_path / "hf" / tensors.PADDING_FILE
    assert path.is_file() == (kept > 0)
    if kept:
        stored = load_file(path)
        assert stored.keys() == (set(VOCABULARY) if untied else {EMBEDDING})
        assert all(len(weight) == kept for weight in stored.values())
    assert comes_back(checkpoint, tmp_path / "hf", tmp_path / "back")
    assert open_checkpoint(tmp_path / "back").config.model.vocab_size == size


def test_after_training_with_transformers(exported, tmp_path) -> None:
    """``save_pretrained`` doesn't copy the file with the padded rows, so they are filled with the mean."""
    checkpoint, directory, _ = exported()
    model = load(directory)
    with torch.no_grad():
        model.get_input_embeddings().weight += 1.0
    model.save_pretrained(tmp_path / "trained")
    import_model(tmp_path / "trained", tmp_path / "back")
    before, after = weights_of(checkpoint), weights_of(tmp_path / "back")
    assert torch.equal(after[EMBEDDING][:97], before[EMBEDDING][:97] + 1.0)
    for key, weight in {EMBEDDING: before[EMBEDDING] + 1.0, OUTPUT: before[OUTPUT]}.items():
        assert after[key].shape == weight.shape == (112, 32)
        assert torch.allclose(after[key][97:], weight[:97].mean(0).expand(15, -1), atol=1e-6)


def test_padded_rows_are_not_restored_after_resizing(exported, tmp_path) -> None:
    """After ``resize_token_embeddings`` into the same directory."""
    changed = shutil.copytree(exported()[1], tmp_path / "changed")
    model = load(changed)
    model.resize_token_embeddings(100)
    model.save_pretrained(changed)
    assert (changed / tensors.PADDING_FILE).is_file()
    import_model(changed, tmp_path / "back")
    after = weights_of(tmp_path / "back")
    assert after[OUTPUT].shape == (112, 32)
    assert torch.equal(after[OUTPUT][:100], model.get_output_embeddings().weight)
    assert torch.allclose(after[OUTPUT][100:], after[OUTPUT][:100].mean(0).expand(12, -1), atol=1e-6)


def test_bfloat16(exported, tmp_path) -> None:
    checkpoint, directory, _ = exported(bf16=True)
    assert {tensor.dtype for tensor in load_file(directory / tensors.PADDING_FILE).values()} == {
        torch.bfloat16
    }
    assert comes_back(checkpoint, directory, tmp_path / "back")
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype="auto")
    assert model.dtype == torch.bfloat16


def test_a_tokenizer_of_another_model_is_refused(exported, tmp_path) -> None:
    tokenizer = byte_level(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="has 402 ids, the model's vocabulary only 97"):
        export_checkpoint(exported()[0], tmp_path / "hf", tokenizer_model=str(tokenizer))
    assert not list(tmp_path.glob("hf*"))
