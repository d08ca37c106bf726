"""Our tools take our own code, and whatever the directory says is not run."""

import json
import shutil

import pytest
import torch

from megatron_mesh.errors import UserError
from megatron_mesh.hf.modeling_mesh import MeshForCausalLM
from megatron_mesh.hf.open_model import open_model
from tests.exports import TOKENS
from tests.helpers import relative_error

pytestmark = pytest.mark.versions


@pytest.mark.parametrize("scheme", ["mesh", "static", "dynamic"])
def test_our_own_code_is_used(exported, tmp_path, scheme) -> None:
    _, directory, logits = exported(recurrence=scheme, layers="1+2R2+1")
    copy = shutil.copytree(directory, tmp_path / "model")
    for path in copy.glob("*.py"):
        path.write_text("raise RuntimeError('run')")
    with pytest.raises(UserError, match=r"has no tokenizer.json"):
        open_model(copy)
    (copy / "tokenizer.json").write_text(TOKENIZER)
    model, tokenizer = open_model(copy, dtype=torch.float32)
    assert type(model) is MeshForCausalLM and tokenizer("a b")["input_ids"] == [1, 2]
    with torch.no_grad():
        assert relative_error(model(TOKENS).logits, logits) < 1e-5


def test_code_of_others_is_not_run(exported, tmp_path) -> None:
    copy = shutil.copytree(exported()[1], tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    config["model_type"] = "theirs"
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "tokenizer.json").write_text(TOKENIZER)
    for path in copy.glob("*.py"):
        path.write_text("raise RuntimeError('run')")
    with pytest.raises(UserError, match="cannot be opened"):
        open_model(copy)


TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"<|endoftext|>": 0, "a": 1, "b": 2}, "unk_token": "a"},
    }
)
