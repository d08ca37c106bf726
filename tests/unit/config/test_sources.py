from pathlib import Path

import pytest

from megatron_mesh.config.settings import PATHS, REFUSED, SETTINGS, load_yaml, merge, read_yaml
from megatron_mesh.errors import UserError


def _read(tmp_path: Path, text: str) -> dict:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


def _message(tmp_path: Path, text: str) -> str:
    with pytest.raises(UserError) as error:
        _read(tmp_path, text)
    return str(error.value)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("hidden_size: 768", "hidden_size", 768),
        ("hidden_size: '768'", "hidden_size", 768),
        ("train_iters: 1e6", "train_iters", 1_000_000),
        ("lr: 1e-3", "lr", 1e-3),  # YAML 1.1 reads this as text
        ("lr: 1", "lr", 1.0),
        ("layers: 24", "layers", "24"),
        ("layers: 4+8R2+4", "layers", "4+8R2+4"),
        ("split: 969,30,1", "split", "969,30,1"),
        ("data_path: prefix", "data_path", ["prefix"]),
        ("data_path: [0.3, a, 0.7, b]", "data_path", ["0.3", "a", "0.7", "b"]),
        ("bf16: yes", "bf16", True),
        ("no_load_optim: true", "load_optim", False),
        ("no_load_rng: false", "load_rng", True),
        ("save: null", "save", None),
        ("recompute_granularity: full", "recompute_granularity", "full"),
        ("recompute_modules: [core_attn, mlp]", "recompute_modules", ["core_attn", "mlp"]),
    ],
)
def test_values_take_the_type_of_the_setting(tmp_path: Path, line: str, name: str, value: object) -> None:
    settings = _read(tmp_path, line)
    assert settings == {name: value}
    assert type(settings[name]) is type(value)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("hidden_size: abc", ["hidden_size", "'abc'", "a whole number"]),
        ("hidden_size: 7.5", ["hidden_size", "7.5", "a whole number"]),
        ("hidden_size: .inf", ["hidden_size", "inf", "a whole number"]),
        ("hidden_size: true", ["hidden_size", "True", "a whole number"]),
        ("hidden_size: [1]", ["hidden_size", "[1]", "a whole number"]),
        ("hidden_size: null", ["hidden_size", "None", "a whole number"]),
        ("mesh_slots: many", ["mesh_slots", "'many'", "a whole number, or null"]),
        ("lr: fast", ["lr", "'fast'", "a number"]),
        ("bf16: 1", ["bf16", "1", "true or false"]),
        ("bf16: maybe", ["bf16", "'maybe'", "true or false"]),
        ("no_load_optim: 0", ["no_load_optim", "0", "true or false"]),
        ("recurrence: {a: 1}", ["recurrence", "{'a': 1}", "text"]),
        ("lr_decay_style: cos", ["lr_decay_style", "'cos'", "one of constant, linear, cosine, WSD"]),
        ("recompute_modules: [attn]", ["recompute_modules", "['attn']", "each one of core_attn, mlp"]),
        ("hiden_size: 7", ["hiden_size", "did you mean hidden_size?"]),
        ("hidden-size: 7", ["hidden-size", "did you mean hidden_size?"]),
        ("no_load_optm: true", ["no_load_optm", "did you mean no_load_optim?"]),
        ("zzz: 7", ["zzz", "--help"]),
        ("model: {hidden_size: 7}", ["unknown setting model"]),
        ("load_optim: true\nno_load_optim: true", ["load_optim and no_load_optim are both given"]),
        ("fp16: true", ["fp16 is not supported", "use --bf16"]),
        ("hidden_size: [", ["is not a YAML file"]),
        ("just text", ["must hold lines of the form"]),
        ("- a list", ["must hold lines of the form"]),
    ],
)
def test_bad_files_name_key_value_and_expectation(tmp_path: Path, line: str, named: list[str]) -> None:
    message = _message(tmp_path, line)
    assert "run.yaml" in message
    for part in named:
        assert part in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "absent.yaml", "No such file"), (tmp_path, "directory")):
        with pytest.raises(UserError, match=reason):
            read_yaml(path)
    binary = tmp_path / "model.pt"
    binary.write_bytes(b"\x80\x04\xff\xfe")
    with pytest.raises(UserError, match="is not a YAML file"):
        read_yaml(binary)


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert _read(tmp_path, "# nothing\n") == {}


def test_refused_settings_do_not_exist() -> None:
    assert not REFUSED.keys() & SETTINGS.keys()


@pytest.mark.parametrize(
    ("earlier", "later", "merged"),
    [
        ({"seed": 1, "lr": 1.0}, {"seed": 2}, {"seed": 2, "lr": 1.0}),
        ({"layers": "4+8R2+4"}, {"num_loops": 3}, {"layers": "4+8R3+4"}),
        ({"layers": "4+8R2+4"}, {"prelude_layers": 1, "coda_layers": 0}, {"layers": "1+8R2+0"}),
        ({"layers": "4+8+8+4"}, {"num_loops": 3}, {"layers": "4+8+8+8+4"}),
        ({"layers": "4+8R2+4"}, {"layers": "1+1R1+1"}, {"layers": "1+1R1+1"}),
        ({"prelude_layers": 4, "num_loops": 2}, {"num_loops": 3}, {"prelude_layers": 4, "num_loops": 3}),
        ({"prelude_layers": 4, "num_loops": 2}, {"layers": "1+1R1+1"}, {"layers": "1+1R1+1"}),
        ({"train_iters": 5}, {"train_samples": 9}, {"train_samples": 9}),
        ({"train_samples": 5}, {"train_iters": 9}, {"train_iters": 9}),
        ({"lr_warmup_fraction": 0.1}, {"lr_warmup_iters": 9}, {"lr_warmup_iters": 9}),
        ({"train_data_path": ["a"], "test_data_path": ["b"]}, {"data_path": ["c"]}, {"data_path": ["c"]}),
        ({"data_path": ["a"]}, {"train_data_path": ["b"]}, {"train_data_path": ["b"]}),
    ],
)
def test_merge(earlier: dict, later: dict, merged: dict) -> None:
    assert merge(earlier, later) == merged


def test_four_parts_replace_a_whole_layout() -> None:
    parts = {"prelude_layers": 1, "core_layers": 2, "num_loops": 3, "coda_layers": 4}
    assert merge({"layers": "24"}, parts) == parts


def test_a_plain_depth_has_no_part_to_change() -> None:
    with pytest.raises(UserError, match="layers 24 is a plain depth"):
        merge({"layers": "24"}, {"num_loops": 3})


def test_a_duplicate_key_is_reported_with_both_lines(tmp_path: Path) -> None:
    message = _message(tmp_path, "lr: 1e-3\nhidden_size: 64\n\nlr: 1e-2\n")
    assert "lr is given twice, in lines 1 and 4; keep one" in message


def test_merge_keys_and_odd_keys(tmp_path: Path) -> None:
    assert "lr is given twice, in lines 1 and 1" in _message(tmp_path, "{lr: 1e-3, lr: 1e-2}")
    path = tmp_path / "merged.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert load_yaml(path)["b"] == {"x": 1, "y": 3}
    assert "is not a YAML file of settings" in _message(tmp_path, "save: {{ dir }}")


def test_paths_expand_as_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    text = "save: ~/x=y\nload: $SCRATCH/y\ndata_path: [0.5, '${SCRATCH}/a', 0.5, ~/b]\noutput_dir: a$$b\n"
    text += "valid_data_path: [books=~/c, code=$SCRATCH/d]\n"
    assert _read(tmp_path, text) == {
        "valid_data_path": ["books=/home/me/c", "code=/scratch/d"],
        "save": "/home/me/x=y",
        "load": "/scratch/y",
        "data_path": ["0.5", "/scratch/a", "0.5", "/home/me/b"],
        "output_dir": "a$b",
    }
    assert "the environment variable NOWHERE is not set" in _message(tmp_path, "save: $NOWHERE/x")
    assert "write $$" in _message(tmp_path, "save: a$/x")


def test_every_setting_with_a_file_or_directory_is_a_path() -> None:
    endings = ("_path", "_dir", "tokenizer_model")
    assert {name for name in SETTINGS if name.endswith(endings) or name in ("save", "load")} == PATHS


def test_another_tokenizer_model_drops_the_tokenizer_type() -> None:
    """The type in a preset doesn't describe the tokenizer on the command line."""
    preset = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "a.json"}
    assert merge(preset, {"tokenizer_model": "b.model"}) == {"tokenizer_model": "b.model"}
    both = {"tokenizer_model": "b.model", "tokenizer_type": "SentencePieceTokenizer"}
    assert merge(preset, both) == both
    assert merge(preset, {"tokenizer_type": "SentencePieceTokenizer"})["tokenizer_model"] == "a.json"
