"""The quickstart script, from raw text to figures, with settings that take seconds."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from matplotlib.image import imread
from transformers import PreTrainedTokenizerFast

from megatron_mesh.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples/quickstart"
STEPS = 4
SETTINGS = """\
recurrence: mesh
layers: 1+1R2+1
hidden_size: 32
num_attention_heads: 2
seq_length: 64
micro_batch_size: 4
global_batch_size: 4
lr: 0.02
eval_interval: 2
eval_iters: 1
log_interval: 1
num_workers: 0
"""


def quickstart(output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    config = output.with_suffix(".yaml")
    config.write_text(SETTINGS, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = ["--output-dir", output, "--config", config, "--corpus-mb", "0.3", "--steps", STEPS, *flags]
    return subprocess.run(
        [sys.executable, "examples/quickstart/run.py", *map(str, options)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a finished quickstart, with what it printed in ``stdout.txt``."""
    directory = tmp_path_factory.mktemp("quickstart") / "out"
    done = quickstart(directory)
    assert done.returncode == 0, done.stderr
    directory.with_name("stdout.txt").write_text(done.stdout, encoding="utf-8")
    return directory


def texts(output: Path, part: str) -> list[str]:
    lines = (output / f"corpus/{part}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line)["text"] for line in lines]


def test_corpus_has_the_size_and_nothing_twice(output: Path) -> None:
    train, valid = texts(output, "train"), texts(output, "valid")
    assert 0.3e6 <= sum(len(text.encode()) for text in train + valid) < 0.3e6 + 256 * 1024
    assert valid and len(set(train + valid)) == len(train) + len(valid)


@pytest.mark.parametrize("part", ["train", "valid"])
def test_ids_turn_back_into_the_corpus(output: Path, part: str) -> None:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(output / "tokenizer/tokenizer.model"))
    ids = np.fromfile(output / f"data/{part}_text_document.bin", dtype=np.uint16)
    ends = np.flatnonzero(ids == tokenizer.eos_id())
    documents = [tokenizer.decode(row[:-1].tolist()) for row in np.split(ids, ends + 1)[:-1]]
    # SentencePiece cannot represent its own sign for a space.
    assert documents == [text.replace("\u2581", " ") for text in texts(output, part)]


def test_the_model_learns_and_is_saved(output: Path) -> None:
    rows = [json.loads(line) for line in (output / "model/metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    valid = [row for row in rows if row["kind"] == "valid"]
    assert [row["step"] for row in train] == [1, 2, 3, 4] and [row["step"] for row in valid] == [2, 4]
    assert train[0]["loss"] == pytest.approx(math.log(4096), abs=0.1)
    assert valid[-1]["loss"] < train[0]["loss"] - 0.1
    assert np.shape(train[-1]["router"]["write"]) == np.shape(train[-1]["router"]["read"]) == (3, 5)
    assert (output / f"model/iter_{STEPS:07d}/config.yaml").is_file()


@pytest.mark.parametrize("name", ["loss.png", "routers.png"])
def test_figures_show_something(output: Path, name: str) -> None:
    pixels = imread(output / "model" / name)
    assert min(pixels.shape[:2]) >= 300
    assert len(np.unique(pixels[..., :3] @ [1.0, 300.0, 90000.0])) > 20  # colours


def test_the_end_says_how_good_and_where(output: Path) -> None:
    said = output.with_name("stdout.txt").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (output / "model/metrics.jsonl").read_text().splitlines()]
    loss = [row["loss"] for row in rows if row["kind"] == "valid"][-1]
    size = sum(len(text.encode()) for text in texts(output, "valid"))
    tokens = len(np.fromfile(output / "data/valid_text_document.bin", dtype=np.uint16))
    assert f"validation loss  {loss:.3f}, perplexity {math.exp(loss):.1f};" in said
    assert f"{loss * tokens / size / math.log(2):.2f} bits per byte" in said
    for place in ("corpus", "tokenizer", "data", "model/metrics.jsonl", "model/loss.png"):
        assert str(output / place) in said
    assert "pretrain_mesh.py" in said and "--override-opt-param-scheduler" in said


def test_the_model_for_hugging_face(output: Path) -> None:
    """It generates text, and its tokenizer gives the ids that the model was trained on."""
    sample = (output / "sample.txt").read_text(encoding="utf-8")
    assert sample.startswith("The first argument") and len(sample) > 60
    assert sample.strip().splitlines()[0] in output.with_name("stdout.txt").read_text(encoding="utf-8")
    original = sentencepiece.SentencePieceProcessor(model_file=str(output / "tokenizer/tokenizer.model"))
    exported = PreTrainedTokenizerFast.from_pretrained(output / "hf")
    for text in texts(output, "valid"):
        assert exported(text)["input_ids"] == original.encode(text)


def test_a_second_run_finds_everything_done(output: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    done = quickstart(output)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("already done") == 8
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before


def test_what_was_made_with_other_options_is_not_taken(output: Path) -> None:
    done = quickstart(output, "--corpus-mb", "5")
    assert done.returncode == 2
    assert "was made with --megabytes 0.3, not with --megabytes 5.0" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_installation_with_little_text_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(QUICKSTART)
    from build_corpus import Document, collect

    documents = [Document("a.py", "x" * 600), Document("b.py", "x" * 600), Document("c.py", "y" * 600)]
    with pytest.raises(UserError, match=r"has only 0\.0 MB .* pip install"):
        collect(documents, 16_000_000)
    assert [document.path for document in collect(documents, 1100)] == ["a.py", "c.py"]


def test_the_corpus_is_the_same_every_time(
    output: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(QUICKSTART)
    from build_corpus import Options, main

    main(Options(tmp_path, megabytes=0.3))
    for name in ("train.jsonl", "valid.jsonl"):
        assert (tmp_path / name).read_bytes() == (output / "corpus" / name).read_bytes()
