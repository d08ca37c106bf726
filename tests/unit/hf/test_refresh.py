"""``--refresh-code`` updates old code, changes nothing else, and loses nobody's edits."""

import difflib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert import refresh
from megatron_mesh.hf.convert.refresh import refresh_code
from megatron_mesh.hf.convert.ship import AUTO_MAP, sources, tokenizer_source
from megatron_mesh.hf.modeling.versions import TESTED
from tests.commands import tool
from tests.exports import TOKENS

EARLY = "# Part of megatron_mesh 0.1.0 (Apache-2.0).\n"


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def without_header(text: str) -> str:
    return text.partition("\n")[2]


@pytest.fixture
def fresh(exported) -> Path:
    """An export with today's code."""
    return exported()[1]


@pytest.fixture
def early(fresh: Path, tmp_path: Path) -> Path:
    """The same export with early code: no checksums, one file fewer, one more, no list of versions."""
    directory = shutil.copytree(fresh, tmp_path / "early")
    for name, text in sources().items():
        (directory / name).write_text(f"{EARLY}# an earlier line\n{without_header(text)}")
    (directory / "versions.py").unlink()
    (directory / "old_helper.py").write_text(f"{EARLY}x = 1\n")
    (directory / "mine.py").write_text("print('not of the export')\n")
    config = json.loads((directory / "config.json").read_text())
    del config["transformers_tested"], config["auto_map"]["AutoModel"]
    config["auto_map"]["AutoTokenizer"] = ["mine.Tokenizer", None]
    (directory / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True)
    )  # as transformers does
    return directory


def test_code_is_replaced_and_nothing_else(early: Path, fresh: Path) -> None:
    before = contents(early)
    changed = refresh_code(early)
    after = contents(early)
    kept = {f"replaced_code/{name}" for name in [*sources(), "old_helper.py"] if name != "versions.py"}
    assert set(changed) == {*sources(), "config.json", "old_helper.py", *kept}
    for name in sources():
        assert after.pop(name) == (fresh / name).read_bytes()
        if name != "versions.py":
            assert after.pop(f"replaced_code/{name}") == before.pop(name)
    assert after.pop("replaced_code/old_helper.py") == before.pop("old_helper.py")
    old, new = (files.pop("config.json").decode() for files in (before, after))
    assert before == after and "model.safetensors" in after and "README.md" in after and "mine.py" in after
    config = json.loads(new)
    assert config.pop("transformers_tested") == list(TESTED)
    assert config.pop("auto_map") == {**AUTO_MAP, "AutoTokenizer": ["mine.Tokenizer", None]}
    assert config == {name: value for name, value in json.loads(old).items() if name != "auto_map"}
    removed = [x for x in difflib.ndiff(old.splitlines(), new.splitlines()) if x.startswith("- ")]
    assert len(removed) <= 2, removed  # no other line changes
    assert refresh_code(early) == []


@pytest.mark.parametrize("scheme", ["mesh", "vanilla"])
def test_the_tokenizers_code_too(exported, tmp_path: Path, scheme: str) -> None:
    """An export of a plain model has no code except perhaps that of its tokenizer."""
    fresh = exported(recurrence=scheme, layers="4" if scheme == "vanilla" else "1+2R2+1")[1]
    directory = shutil.copytree(fresh, tmp_path / "export")
    ((name, text),) = tokenizer_source().items()
    (directory / name).write_text(f"{EARLY}{without_header(text)}")
    before = contents(directory)
    assert refresh_code(directory) == sorted([name, f"replaced_code/{name}"])
    after = contents(directory)
    assert after.pop(name) == text.encode() and after.pop(f"replaced_code/{name}") == before.pop(name)
    assert after == before


@pytest.mark.versions
def test_a_refreshed_model_computes_the_same(early: Path, fresh: Path) -> None:
    refresh_code(early)
    logits = []
    for directory in (early, shutil.copytree(fresh, early.with_name("fresh"))):
        # Not AutoModel, which prefers megatron_mesh's own classes once a test has registered them.
        names = ("configuration_mesh.MeshConfig", "modeling_mesh.MeshForCausalLM")
        _, model = (get_class_from_dynamic_module(name, str(directory)) for name in names)
        with torch.no_grad():
            logits.append(model.from_pretrained(directory)(TOKENS).logits)
    assert torch.equal(*logits)


def test_code_with_a_checksum_needs_no_backup(fresh: Path, tmp_path: Path, monkeypatch) -> None:
    directory = shutil.copytree(fresh, tmp_path / "model")
    newer = {**sources(), "mesh.py": sources()["mixing.py"]}
    monkeypatch.setattr(refresh.ship, "sources", lambda: newer)
    assert refresh_code(directory) == ["mesh.py"]
    assert not (directory / "replaced_code").exists()
    assert (directory / "mesh.py").read_text() == newer["mesh.py"]


def edited(directory: Path) -> None:
    path = directory / "mesh.py"
    path.write_text(path.read_text().replace("def ", "def  ", 1))


def not_ours(directory: Path) -> None:
    (directory / "mesh.py").write_text("x = 1\n")


def newer(directory: Path) -> None:
    (directory / "mesh.py").write_text("# Part of megatron_mesh 99.0.0 (Apache-2.0).\nx = 1\n")


def config_with(**entries: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **entries}))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (config_with(auto_map="modeling_mesh.MeshModel"), "auto_map is not a JSON object"),
        (edited, r"mesh\.py was edited after the export .* move it elsewhere"),
        (not_ours, r"mesh\.py would be overwritten, but lacks the first line .* move it elsewhere"),
        (newer, r"mesh\.py is from megatron_mesh 99\.0\.0, which is newer than .*; upgrade megatron_mesh"),
        (config_with(model_type="llama"), r"config\.json describes a llama model; give a directory written"),
        (config_with(recurrence="spiral"), r"doesn't know the recurrence 'spiral'"),
        (lambda path: (path / "config.json").write_text("{"), r"cannot read .*config\.json"),
        (lambda path: (path / "config.json").write_text("[]"), r"config\.json describes a None model"),
        (lambda path: (path / "config.json").unlink(), r"cannot read .*config\.json"),
    ],
)
def test_refused(fresh: Path, tmp_path: Path, spoil, message: str) -> None:
    directory = shutil.copytree(fresh, tmp_path / "model")
    (directory / "schemes.py").write_text(EARLY)  # so that there is something to refresh
    spoil(directory)
    before = contents(directory)
    with pytest.raises(UserError, match=message):
        refresh_code(directory)
    assert contents(directory) == before


def test_a_backup_overwrites_nothing(early: Path) -> None:
    (early / "replaced_code").mkdir()
    (early / "replaced_code/mesh.py").write_text("precious")
    before = contents(early)
    with pytest.raises(UserError, match=r"replaced_code/mesh\.py already exists with other content; move"):
        refresh_code(early)
    assert contents(early) == before


def test_a_plain_model_has_no_code(exported) -> None:
    directory = exported(recurrence="vanilla", layers="2")[1]
    before = contents(directory)
    assert refresh_code(directory) == [] and contents(directory) == before


def test_an_interruption(early: Path, tmp_path: Path, monkeypatch) -> None:
    """Refreshing again completes it, wherever it was interrupted."""
    whole = shutil.copytree(early, tmp_path / "whole")
    steps = len(refresh_code(whole)) - 1  # all but the removed file are put in place by os.replace
    real = os.replace
    for step in range(steps):
        directory = shutil.copytree(early, tmp_path / str(step))
        left = iter(range(step))

        def replace(source: Path, target: Path, left=left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            refresh_code(directory)
        monkeypatch.setattr(os, "replace", real)
        (directory / "mesh.py.refresh").write_text("as if it had been killed")
        refresh_code(directory)
        (directory / "mesh.py.refresh").unlink(missing_ok=True)
        assert contents(directory) == contents(whole), step


def test_a_directory_that_cannot_be_written(early: Path, monkeypatch) -> None:
    before = contents(early)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", denied)
    with pytest.raises(UserError, match=r"cannot write to .*early .*Permission denied"):
        refresh_code(early)
    assert contents(early) == before


def test_the_tool(early: Path, fresh: Path, capsys) -> None:
    main = tool("convert_to_hf")
    main(["--refresh-code", str(early)])
    out = capsys.readouterr().out
    assert f"refreshed in {early}: config.json, configuration_mesh.py" in out and "is kept in" in out
    main(["--refresh-code", str(early)])
    assert capsys.readouterr().out == f"{early} has no outdated code\n"
    for mistake in (["--refresh-code", str(early), "--save", "x"], [], ["--load", "x"]):
        with pytest.raises(UserError, match="--refresh-code"):
            main(mistake)
