"""Conversion of stock GPT-NeoX models to checkpoints, and to recursive models."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from megatron_mesh.checkpoint import offline
from megatron_mesh.checkpoint.offline import open_checkpoint
from megatron_mesh.config.layout import parse_layers
from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert.export import export_checkpoint
from megatron_mesh.hf.convert.import_model import ToRecursive, core_sources, import_model
from tests.commands import tool
from tests.exports import TOKENS
from tests.helpers import relative_error
from tests.unit.hf.test_logits import load, weights_of

ROOT = Path(__file__).resolve().parents[3]


def stock(directory: Path, **settings) -> GPTNeoXForCausalLM:
    """Save and return a stock model with random parameters, none of which is zero or one."""
    values = {
        "vocab_size": 128,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 16,
        **settings,
    }
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    model.save_pretrained(directory)
    return model


def same(a: GPTNeoXForCausalLM, b: GPTNeoXForCausalLM) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Layers and heads of the Pythia suite; the rest is scaled down.
PYTHIA = [(6, 8), (12, 12), (24, 16), (16, 8), (24, 16), (32, 32), (32, 32), (36, 40)]


@pytest.mark.parametrize(("layers", "heads"), PYTHIA)
def test_stock_models_come_back_bitwise(tmp_path, layers, heads) -> None:
    model = stock(
        tmp_path / "stock", num_hidden_layers=layers, num_attention_heads=heads, hidden_size=8 * heads
    )
    settings = import_model(tmp_path / "stock", tmp_path / "megatron")
    assert (settings.recurrence, settings.layers, settings.scale_embeddings) == (
        "vanilla",
        str(layers),
        False,
    )
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    back = GPTNeoXForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    assert same(model, back)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, back(TOKENS).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": True},
        {"rotary_pct": 0.5, "rotary_emb_base": 500, "layer_norm_eps": 1e-3},
        {"vocab_size": 77, "intermediate_size": 72},
    ],
)
def test_variants_come_back(tmp_path, settings) -> None:
    model = stock(tmp_path / "stock", **settings)
    found = import_model(tmp_path / "stock", tmp_path / "megatron")
    assert found.untie_embeddings_and_output_weights != settings.get("tie_word_embeddings", False)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    back = GPTNeoXForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert same(model, back)
    with torch.no_grad():
        assert torch.equal(model(TOKENS % 77).logits, back(TOKENS % 77).logits)


def test_torch_files_are_read_without_running_them(tmp_path) -> None:
    model = stock(tmp_path / "stock")
    weights = load_file(tmp_path / "stock/model.safetensors")
    (tmp_path / "stock/model.safetensors").unlink()
    torch.save(
        {**weights, "gpt_neox.layers.0.attention.bias": torch.ones(1)}, tmp_path / "stock/pytorch_model.bin"
    )
    import_model(tmp_path / "stock", tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert same(model, GPTNeoXForCausalLM.from_pretrained(tmp_path / "back"))


class Hostile:
    """Writes a file when it is unpickled freely."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_that_cannot_be_read(tmp_path) -> None:
    """Each error says what to do. A hostile file is not run, and the user isn't advised to run it."""
    directory, ran = tmp_path / "stock", tmp_path / "ran"
    stock(directory)
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()

    def refused(message: str) -> str:
        with pytest.raises(UserError, match=message) as caught:
            import_model(directory, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    pickled = directory / "pytorch_model.bin"
    torch.save({**weights, "x": Hostile(ran)}, pickled)
    assert "weights_only" not in refused(
        "contains objects other than tensors, .*get the model as safetensors"
    )
    assert not ran.exists()
    torch.save(weights, pickled, _use_new_zipfile_serialization=False)
    refused("cannot read .*get the model as safetensors")
    torch.save(list(weights.values()), pickled)
    refused("isn't a dictionary of tensors")
    index = directory / "model.safetensors.index.json"
    for content in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(content)
        refused(r"cannot read .*index\.json .*download the model again")
    save_file({"x": torch.ones(1)}, directory / "a.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "a.safetensors")}))
    refused(r"cannot read .*a\.safetensors .*; download it again")


def test_megatron_computes_the_same(tmp_path) -> None:
    """The logits of Megatron's model with the weights of a stock one."""
    from megatron_mesh.parallel import build_stage
    from tests.exports import export_config, load_weights
    from tests.helpers import one_process

    model = stock(tmp_path / "stock", num_hidden_layers=3)
    import_model(tmp_path / "stock", tmp_path / "megatron")
    config = open_checkpoint(tmp_path / "megatron").config
    names = ("recurrence", "layers", "hidden_size", "num_attention_heads", "scale_embeddings", "vocab_size")
    ours = export_config(tmp_path, **{name: getattr(config.model, name) for name in names})
    with one_process(ours), torch.no_grad():
        with torch.enable_grad():
            stage = build_stage(ours)
        load_weights(stage, tmp_path / "megatron")
        positions = torch.arange(16).expand_as(TOKENS)
        logits = stage.modules[0](TOKENS, positions, None)
    with torch.no_grad():
        assert relative_error(logits, model(TOKENS).logits) < 1e-5


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("average", [[1, 4, 7], [2, 5, 8], [3, 6, 9]]),
        ("first", [[1], [2], [3]]),
        ("stepwise", [[1], [5], [9]]),
    ],
)
def test_a_recursive_model_from_a_plain_one(tmp_path, choice, expected) -> None:
    """1+3R3+2 from 12 layers: every tensor is the mean of the right ones."""
    assert core_sources(parse_layers("1+3R3+2"), choice) == expected
    model = stock(tmp_path / "stock", num_hidden_layers=12)
    settings = import_model(tmp_path / "stock", tmp_path / "megatron", ToRecursive("1+3R3+2", core=choice))
    assert (settings.recurrence, settings.layers, settings.mesh_slots) == ("mesh", "1+3R3+2", 6)
    export_checkpoint(tmp_path / "megatron", tmp_path / "recursive")
    plain, recursive = model.state_dict(), load_file(tmp_path / "recursive/model.safetensors")
    parts = {"prelude": [[0]], "core": expected, "coda": [[10], [11]]}
    for part, layers in parts.items():
        for index, sources in enumerate(layers):
            prefix = f"model.{part}.{index}."
            for name in [name for name in recursive if name.startswith(prefix)]:
                rest = name.removeprefix(prefix)
                mean = torch.stack([plain[f"gpt_neox.layers.{n}.{rest}"] for n in sources]).mean(0)
                assert torch.equal(recursive[name], mean), name
    assert torch.equal(recursive["model.embed_in.weight"], plain["gpt_neox.embed_in.weight"])
    routers = recursive["model.recurrence.write.0.weight"]
    assert float(routers.std()) == pytest.approx(0.02, rel=0.3)
    with torch.no_grad():
        assert torch.isfinite(load(tmp_path / "recursive")(TOKENS).logits).all()


def test_after_an_interruption(tmp_path, monkeypatch) -> None:
    """No incomplete checkpoint remains, and the same call succeeds."""
    model = stock(tmp_path / "stock")
    with monkeypatch.context() as patch:
        patch.setattr(offline, "write_small_files", lambda *arguments: raise_interrupt())
        with pytest.raises(KeyboardInterrupt):
            import_model(tmp_path / "stock", tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()
    import_model(tmp_path / "stock", tmp_path / "megatron")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "stock"]
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert same(model, GPTNeoXForCausalLM.from_pretrained(tmp_path / "back"))


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def test_a_loop_of_one_is_the_plain_model(tmp_path) -> None:
    model = stock(tmp_path / "stock")
    import_model(tmp_path / "stock", tmp_path / "megatron", ToRecursive("1+2R1+1", recurrence="base"))
    export_checkpoint(tmp_path / "megatron", tmp_path / "recursive")
    with torch.no_grad():
        ours, theirs = load(tmp_path / "recursive")(TOKENS).logits, model(TOKENS).logits
    assert torch.equal(ours, theirs)


def test_mistakes(tmp_path) -> None:
    stock(tmp_path / "stock")
    path = tmp_path / "stock/config.json"
    good = json.loads(path.read_text())

    def refused(
        message: str, directory: Path = tmp_path / "stock", recursive: ToRecursive | None = None
    ) -> None:
        with pytest.raises(UserError, match=message):
            import_model(directory, tmp_path / "out", recursive)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()

    refused(r"cannot read .*config\.json", tmp_path)
    refused("has no loop; write", recursive=ToRecursive("1+1+1+1"))
    refused("is 6 layers deep, but the model has 4 layers", recursive=ToRecursive("1+2R2+1"))
    for scheme in ("vanilla", "vanilla+mesh"):
        refused("doesn't share its core; choose another, e.g. mesh", recursive=ToRecursive("1+1R2+1", scheme))
    refused("--recurrence mosh does not exist", recursive=ToRecursive("1+1R2+1", "mosh"))
    path.write_text("[]")
    refused("is not a JSON object")
    path.write_text(json.dumps({name: value for name, value in good.items() if name != "vocab_size"}))
    refused("missing fields: vocab_size; download or export the model again")
    for change, message in {
        ("model_type", "llama"): 'model_type is "llama"',
        ("use_parallel_residual", False): "use_parallel_residual is false",
        ("hidden_act", "gelu_new"): 'hidden_act is "gelu_new"',
        ("num_hidden_layers", 5): "lacks the tensor gpt_neox.layers.4",
        ("intermediate_size", 64): r"has the shape \[128, 32\], but config\.json calls for \[64, 32\]",
    }.items():
        path.write_text(json.dumps({**good, change[0]: change[1]}))
        refused(message)
    path.write_text(json.dumps(good))
    weights = tmp_path / "stock/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("cannot read")
    weights.unlink()
    refused("contains no weights")
    save_file({"x": torch.ones(1)}, weights)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="already exists"):
        import_model(tmp_path / "stock", tmp_path / "out")


def test_a_run_starts_from_it(tmp_path, capsys) -> None:
    """Run the tool, and then the training command that it prints."""
    stock(tmp_path / "stock")
    call = ["--load", str(tmp_path / "stock"), "--save", str(tmp_path / "megatron")]
    convert = tool("convert_from_hf")
    with pytest.raises(UserError, match="--core needs --to-recursive"):
        convert([*call, "--core", "first"])
    convert([*call, "--to-recursive", "1+1R2+1"])
    start = next(line.split() for line in capsys.readouterr().out.splitlines() if "--finetune" in line)
    write_ids(tmp_path / "ids")
    run = {
        "--data-path": tmp_path / "ids", "--split": "80,20,0", "--train-iters": 2, "--global-batch-size": 2,
        "--micro-batch-size": 1, "--eval-iters": 1, "--save": tmp_path / "run", "--no-bf16": "",
    }  # fmt: skip
    rest = [str(word) for pair in run.items() for word in pair if word != ""]
    command = [sys.executable, str(ROOT / "pretrain_mesh.py"), *start[1:-1], *rest]  # start ends with dots
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    before, after = (weights_of(tmp_path / place) for place in ("megatron", "run/iter_0000002"))
    assert before.keys() == after.keys()
    for key, weight in before.items():  # two steps of a small rate, from these weights
        assert 0 < relative_error(after[key], weight) < 0.2, key


def write_ids(prefix: Path) -> None:
    """400 tokens of documents."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for index in range(20):
        builder.add_document((torch.arange(20) + index) % 128, [20])
    builder.finalize(f"{prefix}.idx")


def test_cores_of_the_papers_splits() -> None:
    """Every core layer comes from one of the loops, none from prelude or coda."""
    for layers in ("2+4R2+2", "4+8R2+4", "3+6R3+3", "3+5R2+3", "5+11R2+5"):
        target = parse_layers(layers)
        for choice in ("average", "first", "stepwise"):
            used = core_sources(target, choice)
            assert len(used) == target.core
            assert all(target.prelude <= n < target.depth - target.coda for layer in used for n in layer)
