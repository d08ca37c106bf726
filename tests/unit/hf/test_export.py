"""Contents and errors of exports. An interrupted export never looks like a complete one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert import export as export_module
from megatron_mesh.hf.convert.export import export_checkpoint
from megatron_mesh.hf.convert.ship import sources
from megatron_mesh.hf.convert.tensors import entries
from megatron_mesh.hf.modeling.versions import TESTED
from tests.exports import TOKENS, export_config, renew_checksums, saved_with_logits
from tests.unit.hf.test_open_model import TOKENIZER

ROOT = Path(__file__).resolve().parents[3]

LAYER = [
    "input_layernorm.weight",
    "input_layernorm.bias",
    "post_attention_layernorm.weight",
    "post_attention_layernorm.bias",
    "attention.query_key_value.weight",
    "attention.query_key_value.bias",
    "attention.dense.weight",
    "attention.dense.bias",
    "mlp.dense_h_to_4h.weight",
    "mlp.dense_h_to_4h.bias",
    "mlp.dense_4h_to_h.weight",
    "mlp.dense_4h_to_h.bias",
]


def layer(prefix: str) -> set[str]:
    return {f"{prefix}.{name}" for name in LAYER}


def ends(body: str, head: str) -> set[str]:
    return {
        f"{body}.embed_in.weight",
        f"{body}.final_layer_norm.weight",
        f"{body}.final_layer_norm.bias",
        head,
    }


def test_names_are_a_contract(exported) -> None:
    """Published exports can only be loaded if these names never change."""
    routers = {
        f"model.recurrence.{kind}.{cycle}.{part}"
        for kind in ("write", "read")
        for cycle in range(3)
        for part in ("weight", "bias")
    }
    parts = ("model.prelude.0", "model.core.0", "model.core.1", "model.coda.0")
    mesh = set().union(*map(layer, parts)) | routers | ends("model", "lm_head.weight")
    assert set(load_file(exported()[1] / "model.safetensors")) == mesh
    plain = exported(recurrence="vanilla", layers="2")[1]
    stock = layer("gpt_neox.layers.0") | layer("gpt_neox.layers.1") | ends("gpt_neox", "embed_out.weight")
    assert set(load_file(plain / "model.safetensors")) == stock
    distinct = {
        entry.name
        for entry in entries(export_config(Path(), recurrence="vanilla+mesh", layers="1+1+1+1").model)
    }
    assert layer("model.cores.1.0") <= distinct


def test_files(exported) -> None:
    _, directory, _ = exported()
    shipped = set(sources())
    assert {
        "configuration_mesh.py",
        "modeling_mesh.py",
        "layers_mesh.py",
        "schemes.py",
        "mesh.py",
        "versions.py",
    } <= shipped
    texts = {"config.json", "generation_config.json", "README.md"}
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    assert files.keys() == shipped | texts | {
        "model.safetensors",
        "training_only/vocabulary_padding.safetensors",
    }
    assert len({path.stat().st_mode for path in files.values()}) == 1, "all files have the same permissions"
    recurrence = ROOT / "megatron_mesh/recurrence/mesh.py"
    assert (directory / "mesh.py").read_text().endswith(recurrence.read_text())  # the source itself
    card = (directory / "README.md").read_text()
    assert "| core, loop 2 | 3 to 4 |\n| coda | 5 |" in card and "model.unrolled.<i>" in card
    assert "\n| | |\n|---|---|\n| non-embedding parameters | " in card and "\n\n## Use\n\n" in card
    assert "mesh 1+2R2+1" in card and "| training loss, nats per token | 4.5000 |" in card
    assert "| validation loss, nats per token | not measured |" in card and "hidden_size: 32" in card
    assert f"Tested with transformers {', '.join(TESTED)}." in card
    config = json.loads((directory / "config.json").read_text())
    assert config["transformers_tested"] == list(TESTED)
    assert config["num_hidden_layers"] == 6 and config["vocab_size"] == 97 and config["rotary_pct"] == 0.25
    assert "megatron_mesh" not in "".join(
        line
        for text in sources().values()
        for line in text.splitlines()
        if line.startswith(("from", "import"))
    )


def with_tokenizer(checkpoint: Path, directory: Path, tokenizer: Path) -> Path:
    """Copy a checkpoint and add a tokenizer to its settings."""
    copy = shutil.copytree(checkpoint, directory / checkpoint.name)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("tokenizer_model: null", f"tokenizer_model: {tokenizer}"))
    renew_checksums(copy)
    return copy


@pytest.mark.versions
def test_a_fast_tokenizer(exported, tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    checkpoint = with_tokenizer(exported()[0], tmp_path, tmp_path / "tokenizer.json")
    export_checkpoint(checkpoint, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("a b")["input_ids"] == [1, 2]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (0, 3, 0)
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 16
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == 0
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"cannot load the run's tokenizer .* --tokenizer-model"):
        export_checkpoint(checkpoint, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.versions
@pytest.mark.parametrize("scheme", ["mesh", "vanilla"])
def test_the_cards_example_runs(exported, tmp_path, monkeypatch, capsys, scheme) -> None:
    """Unchanged, and without asking interactively whether to trust the code."""
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    source = exported(recurrence=scheme, layers={"vanilla": "4"}.get(scheme, "1+2R2+1"))[0]
    checkpoint = with_tokenizer(source, tmp_path, tmp_path / "tokenizer.json")
    export_checkpoint(checkpoint, tmp_path / "hf")
    example = (tmp_path / "hf/README.md").read_text().split("```python\n")[1].split("```")[0]
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "n")
    exec(example.replace("DIRECTORY", str(tmp_path / "hf")), {})
    assert asked == [] and capsys.readouterr().out.strip()


@pytest.mark.versions
@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
         "remove_extra_whitespaces": False, "add_dummy_prefix": False, "user_defined_symbols": ["\n"]},
        {"model_type": "bpe"},
        {"model_type": "unigram", "byte_fallback": True},
    ],
    ids=["quickstart", "bpe", "unigram"],
)  # fmt: skip
def test_a_sentencepiece_tokenizer(exported, tmp_path, options) -> None:
    lines = [path.read_text(encoding="utf-8") for path in (ROOT / "megatron_mesh").rglob("*.py")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(lines).splitlines(keepends=True)),
        model_prefix=str(tmp_path / "spm"), vocab_size=600, minloglevel=2, **options,
    )  # fmt: skip
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    checkpoint = with_tokenizer(exported(vocab_size=600)[0], tmp_path, tmp_path / "spm.model")
    export_checkpoint(checkpoint, tmp_path / "hf")
    fast = options["model_type"] == "bpe" and options.get("normalization_rule_name") == "identity"
    assert (tmp_path / "hf/tokenizer.json").is_file() == fast
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=not fast)
    for text in lines[:20]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == original.encode(text)
    ids = original.encode("def f(x): return x")
    assert tokenizer.decode(ids) == original.decode(ids)
    assert tokenizer.eos_token_id == original.eos_id()


def test_existing_files_are_not_overwritten(exported, tmp_path) -> None:
    checkpoint, _, _ = exported()
    target = tmp_path / "model"
    target.mkdir()
    export_checkpoint(checkpoint, target)  # an empty directory may be used
    (target / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match=r"already exists; .* --force"):
        export_checkpoint(checkpoint, target)
    assert (target / "mine.txt").read_text() == "precious"
    export_checkpoint(checkpoint, target, force=True, dtype=torch.bfloat16)
    assert not (target / "mine.txt").exists()
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(target / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_force_spares_the_checkpoint(exported, tmp_path) -> None:
    run = tmp_path / "run"
    checkpoint = shutil.copytree(exported()[0], run / "iter_0000003")
    before = sorted(checkpoint.iterdir())
    for target in (checkpoint, run, tmp_path):
        with pytest.raises(UserError, match=r"contains the checkpoint that is converted, .*choose another"):
            export_checkpoint(run, target, force=True)
    assert sorted(checkpoint.iterdir()) == before and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_symbolic_link_is_preserved(exported, tmp_path) -> None:
    """The directory that it points to is replaced, which may be on another disk."""
    (tmp_path / "disk/model").mkdir(parents=True)
    (tmp_path / "disk/model/old.txt").touch()
    (tmp_path / "model").symlink_to(tmp_path / "disk/model")
    export_checkpoint(exported()[0], tmp_path / "model", force=True)
    assert (tmp_path / "model").is_symlink() and not (tmp_path / "disk/model/old.txt").exists()
    assert (tmp_path / "disk/model/config.json").is_file()
    assert sorted(p.name for p in tmp_path.rglob("*model*") if p.is_dir()) == ["model", "model"]


def test_invalid_targets(exported, tmp_path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="file is a file; choose another --save"):
        export_checkpoint(exported()[0], tmp_path / "file", force=True)
    with pytest.raises(UserError, match=r"cannot write to --save .*choose another"):
        export_checkpoint(exported()[0], tmp_path / "file/model")
    assert (tmp_path / "file").read_text() == "precious"


def test_an_interrupted_conversion_leaves_no_model(exported, tmp_path, monkeypatch) -> None:
    checkpoint, _, _ = exported()
    real = export_module.write_tensors

    def stops(tensors, path):
        real(tensors, path)
        if "00003" in str(path):
            raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "write_tensors", stops)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(checkpoint, tmp_path / "model", shard_bytes=20_000)
    assert [path.name for path in tmp_path.iterdir()] == ["model.partial"]
    assert not (tmp_path / "model.partial/config.json").exists()  # so that it cannot be loaded
    monkeypatch.undo()
    export_checkpoint(checkpoint, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_mistakes(exported, tmp_path) -> None:
    checkpoint, _, _ = exported()

    def refused(path: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            export_checkpoint(path, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()

    refused(tmp_path / "nowhere", "is not a directory")
    refused(tmp_path, "not a complete checkpoint")
    partial = shutil.copytree(checkpoint, tmp_path / "iter_0000003.partial")
    (partial / "state.json").unlink()
    refused(partial, "not a complete checkpoint")
    damaged = shutil.copytree(checkpoint, tmp_path / "iter_0000004")
    shard = next(damaged.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(damaged, f"damaged: {shard.name} has")


def test_the_tool(exported, tmp_path) -> None:
    checkpoint, directory, _ = exported()

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools/convert_to_hf.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600)

    done = call("--load", checkpoint.parent, "--save", tmp_path / "model")  # the newest of the run
    assert done.returncode == 0 and "wrote" in done.stdout, done.stderr
    one, other = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "model"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    refused = call("--load", checkpoint, "--save", tmp_path / "model")
    last = refused.stderr.splitlines()[-1]  # torch built for CUDA may first warn about a missing GPU
    assert refused.returncode == 2 and last.startswith("error: ") and "--force" in last


def test_peak_memory_is_a_shard(tmp_path) -> None:
    """Converting takes the memory of a shard, not of the model."""
    checkpoint, _ = saved_with_logits(tmp_path / "run", hidden_size=512, layers="2+8R2+2", seq_length=16)
    code = f"""
import resource, torch
from pathlib import Path
from megatron_mesh.hf.convert.export import export_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export_checkpoint(Path({str(checkpoint)!r}), Path({str(tmp_path / "hf")!r}), shard_bytes=8 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    weights = sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    assert weights > 140e6
    assert int(ended.stdout) * 1024 < 0.6 * weights


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_coefficients_stay_in_float32(exported, scheme: str) -> None:
    """In a bfloat16 export, and in the model that transformers loads from it."""
    directory = exported(recurrence=scheme, layers="1+2R2+1", bf16=True)[1]
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.bfloat16)
    dtypes = {("recurrence" in name, parameter.dtype) for name, parameter in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    stored = load_file(directory / "model.safetensors")
    assert {stored[name].dtype for name in stored if "recurrence" in name} == {torch.float32}
    assert model(TOKENS).logits.dtype == torch.bfloat16
