"""Exports of every scheme have the logits of the Megatron model, and convert back bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM

from megatron_mesh.checkpoint.content import NOT_WEIGHTS
from megatron_mesh.checkpoint.offline import open_index
from megatron_mesh.checkpoint.reader import read_tensor
from megatron_mesh.hf.convert import tensors
from megatron_mesh.hf.convert.export import export_checkpoint
from megatron_mesh.hf.convert.import_model import import_model
from megatron_mesh.recurrence import SCHEMES
from tests.exports import TOKENS
from tests.helpers import relative_error

pytestmark = pytest.mark.versions

CASES = [
    *(
        {"recurrence": s, "layers": f"1+2R{k}+1"}
        for s in SCHEMES
        if SCHEMES[s].shared_core
        for k in (1, 2, 3)
    ),
    *({"recurrence": "vanilla+mesh", "layers": layers} for layers in ("1+2+1", "1+2+2+1", "1+1+1+1+2")),
    {"recurrence": "vanilla", "layers": "4"},
    {"recurrence": "vanilla", "layers": "3", "untie_embeddings_and_output_weights": False},
    {"recurrence": "mesh", "layers": "1+1R2+1", "untie_embeddings_and_output_weights": False},
    {"recurrence": "mesh", "layers": "0+2R2+0", "mesh_slots": 4, "mesh_transition_query": "embedding"},
    {"recurrence": "mesh", "layers": "1+1R2+1", "scale_embeddings": False, "rotary_percent": 0.5},
    {
        "recurrence": "mesh",
        "layers": "1+1R2+1",
        "ffn_hidden_size": 72,
        "rotary_base": 500,
        "norm_epsilon": 1e-2,
    },
    {"recurrence": "anchor", "layers": "1+1R2+1", "hidden_size": 48, "num_attention_heads": 6},
]


def load(directory: Path, **options):
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the checkpoint's model, without sharding."""
    index = open_index(checkpoint)
    return {key: read_tensor(index, key) for key in index.entries if not key.startswith(NOT_WEIGHTS)}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['recurrence']}-{c['layers']}-{len(c)}")
def test_logits_and_conversion_back(exported, tmp_path, case) -> None:
    checkpoint, directory, logits = exported(**case)
    with torch.no_grad():
        ours = load(directory, dtype=torch.float32)(TOKENS).logits
    assert ours.shape == logits.shape == (3, 16, 97)
    assert relative_error(ours, logits) < 1e-5
    if case["recurrence"] == "vanilla":
        return  # its export has a folded embedding scale; see test_plain_models
    import_model(directory, tmp_path / "back")
    before, after = weights_of(checkpoint), weights_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_bfloat16_comes_back_bitwise(exported, tmp_path) -> None:
    checkpoint, directory, _ = exported(bf16=True)
    assert load(directory, dtype="auto").dtype == torch.bfloat16
    import_model(directory, tmp_path / "back")
    before, after = weights_of(checkpoint), weights_of(tmp_path / "back")
    assert all(before[key].dtype == torch.bfloat16 and torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize("hidden_size", [32, 64])
def test_plain_models(exported, tmp_path, hidden_size, untied) -> None:
    """A plain model becomes a stock GPT-NeoX without code, and converts back bit for bit."""
    case = {"recurrence": "vanilla", "layers": "3", "hidden_size": hidden_size}
    case["untie_embeddings_and_output_weights"] = untied
    checkpoint, directory, _ = exported(**case)
    assert not list(directory.glob("*.py"))
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert type(model) is GPTNeoXForCausalLM
    settings = import_model(directory, tmp_path / "back")
    before, after = weights_of(checkpoint), weights_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert settings.scale_embeddings and settings.untie_embeddings_and_output_weights == untied
    export_checkpoint(tmp_path / "back", tmp_path / "again")
    again = GPTNeoXForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("hidden_size", [32, 64])
def test_a_plain_model_trained_after_its_export(exported, tmp_path, hidden_size) -> None:
    """Its embedding has changed, so the stored unscaled embedding must not be restored."""
    _, directory, _ = exported(recurrence="vanilla", layers="3", hidden_size=hidden_size)
    changed = tmp_path / "changed"
    shutil.copytree(directory, changed)
    model = GPTNeoXForCausalLM.from_pretrained(changed)
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[7] = torch.linspace(0.1, 0.9, hidden_size)
    model.save_pretrained(changed)
    assert (changed / tensors.EMBEDDING_FILE).exists() == (hidden_size == 32)
    import_model(changed, tmp_path / "back")
    export_checkpoint(tmp_path / "back", tmp_path / "again")
    again = GPTNeoXForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_shards(exported, tmp_path) -> None:
    """Many small files give the same model."""
    checkpoint, directory, _ = exported()
    export_checkpoint(checkpoint, tmp_path / "sharded", shard_bytes=30_000)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    one, many = load(directory).state_dict(), load(tmp_path / "sharded").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)
    import_model(tmp_path / "sharded", tmp_path / "back")
    before, after = weights_of(checkpoint), weights_of(tmp_path / "back")
    assert all(torch.equal(before[key], after[key]) for key in before)
