"""Our tools use the package's own code and never run code in a directory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert.import_model import import_model
from megatron_mesh.hf.convert.open_model import open_model
from megatron_mesh.hf.modeling.modeling_mesh import MeshForCausalLM
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
    with pytest.raises(UserError, match="cannot open the model"):
        open_model(copy)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": "{"},
        {"tokenizer.json": "", "tokenizer_config.json": "{"},
        {"tokenizer.json": "", "tokenizer_config.json": "[]"},
        {"tokenizer.model": "x", "tokenizer_config.json": '{"tokenizer_class": "MeshTokenizer"}'},
        {"tokenizer.model": "x"},
    ],
)
def test_a_damaged_tokenizer(exported, tmp_path, files) -> None:
    copy = shutil.copytree(exported()[1], tmp_path / "model")
    for name, text in files.items():
        (copy / name).write_text(text or TOKENIZER)
    with pytest.raises(UserError, match=r"cannot open the tokenizer in .* \(.+\); convert again") as caught:
        open_model(copy)
    assert "\n" not in str(caught.value)


def test_an_opened_model_is_saved_with_its_code(exported, tmp_path) -> None:
    """It loads with equal logits in a process without this package, and converts back to a checkpoint."""
    _, directory, logits = exported(recurrence="mesh", layers="1+2R2+1")
    copy = shutil.copytree(directory, tmp_path / "model")
    (copy / "tokenizer.json").write_text(TOKENIZER)
    model, _ = open_model(copy, dtype=torch.float32)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/modeling_mesh.py").write_text("raise RuntimeError('old')")  # is replaced
    model.save_pretrained(tmp_path / "saved")
    torch.save((TOKENS, logits), tmp_path / "wanted.pt")
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    overlays = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path != str(ROOT)]
    environment |= {"PYTHONPATH": os.pathsep.join(overlays), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5
    assert import_model(tmp_path / "saved", tmp_path / "megatron").recurrence == "mesh"


ROOT = Path(__file__).resolve().parents[3]
LOAD = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "megatron_mesh":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())  # an editable install would find it
import torch
from transformers import AutoModelForCausalLM

saved, wanted = sys.argv[1] + "/saved", sys.argv[1] + "/wanted.pt"
model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True, dtype=torch.float32)
tokens, wanted = torch.load(wanted)
logits = model(tokens).logits[..., : wanted.shape[-1]]
wanted = wanted[..., : logits.shape[-1]]
print(((logits - wanted).norm() / wanted.norm()).item())
"""
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
