"""From raw text to indexed data: the tokenizer's own ids, all formats, and errors before any output."""

import gzip
import json
import lzma
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_mesh.data import build_tokenizer
from megatron_mesh.data import preprocess as module
from megatron_mesh.data.corpus import read_chunks
from megatron_mesh.data.encode import (
    Encoded,
    GigatokenEncoder,
    HuggingFaceEncoder,
    choose_encoder,
    first_difference,
    probe_texts,
)
from megatron_mesh.data.preprocess import PreprocessSettings, preprocess
from megatron_mesh.data.tokenizer import Tokenizer
from megatron_mesh.errors import UserError
from tests.unit.data.corpora import sentences, write_jsonl

ODD = [
    "before <|endoftext|> after<|endoftext|><|padding|> end",
    "cafe\u0301 \u00e9 \u212b \ufb01 \u200b\ufeff\u2028 \x00\x7f \U0001f469\u200d\U0001f467\U0001f3fd",
    "  leading,   many     spaces\t\ttabs\n\n\nlines\r\n  ",
    "\u4e2d\u6587\u65e5\u672c \u0928\u092e\u0938\u094d\u0924\u0947 \u05e9\u05b8 \U0010ffff",
    "x" * 5000,
]


def run(tokenizer: Tokenizer, tmp_path: Path, *inputs: str, **settings: Any) -> module.Progress:
    return preprocess(tokenizer, PreprocessSettings(list(inputs), str(tmp_path / "out"), **settings))


def rows(tmp_path: Path, key: str = "text") -> list[list[int]]:
    data = IndexedDataset(str(tmp_path / f"out_{key}_document"))
    return [data[i].tolist() for i in range(len(data))]


def test_output_equals_megatrons(hf_model: str, tmp_path: Path) -> None:
    """One tokenizer call and one add_document per document, as in Megatron-LM's tools/preprocess_data.py."""
    tokenizer = build_tokenizer(None, hf_model)
    texts = [*sentences(300), *ODD]
    run(tokenizer, tmp_path, write_jsonl(tmp_path / "c.jsonl", texts), append_eod=True, workers=2)
    builder = IndexedDatasetBuilder(str(tmp_path / "classic.bin"), np.uint16)
    for text in texts:
        ids = [*tokenizer.tokenize(text), tokenizer.eod]
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "classic.idx"))
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / f"out_text_document{suffix}").read_bytes()
        assert ours == (tmp_path / f"classic{suffix}").read_bytes()


@pytest.mark.parametrize("workers", [1, 3])
def test_order_and_chunks(
    hf_model: str, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many small chunks, some with a line longer than a chunk, are written in the order of the input."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 512)
    tokenizer = build_tokenizer(None, hf_model)
    texts = [*sentences(200), *ODD, *sentences(50, seed=1)]
    done = run(tokenizer, tmp_path, write_jsonl(tmp_path / "c.jsonl", texts), workers=workers)
    assert rows(tmp_path) == [tokenizer.tokenize(text) for text in texts]
    assert done.documents == len(texts)
    assert done.text_bytes == done.disk_bytes == (tmp_path / "c.jsonl").stat().st_size


def test_decoding_gives_the_text_back(sp_model: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(None, sp_model)
    texts = [*sentences(50), "naïve 日本 🙂"]
    run(tokenizer, tmp_path, write_jsonl(tmp_path / "c.jsonl", texts), append_eod=True)
    read = rows(tmp_path)
    assert all(row[-1] == tokenizer.eod for row in read)
    assert [tokenizer.detokenize(row[:-1]) for row in read] == texts


def test_every_format_gives_the_same(hf_model: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(None, hf_model)
    texts = sentences(30)
    plain = Path(write_jsonl(tmp_path / "plain.jsonl", texts)).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(plain))
    frames = zstandard.compress(plain[:100]) + zstandard.compress(plain[100:])
    (tmp_path / "c.jsonl.zst").write_bytes(frames)
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbf" + texts[0].encode() + b"\nsecond line\n")
    run(
        tokenizer,
        tmp_path,
        str(tmp_path / "*.jsonl.*"),
        str(tmp_path / "plain.jsonl"),
        str(tmp_path / "d.txt"),
    )
    expected = [tokenizer.tokenize(text) for text in [*texts * 4, texts[0] + "\nsecond line\n"]]
    assert rows(tmp_path) == expected


def test_several_keys_and_blank_lines(hf_model: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(None, hf_model)
    lines = [json.dumps({"title": f"t{i}", "text": f"body {i}" if i else ""}) for i in range(4)]
    (tmp_path / "c.jsonl").write_text("\n\n  \n".join(lines))
    done = run(tokenizer, tmp_path, str(tmp_path / "c.jsonl"), json_keys=["text", "title"])
    assert rows(tmp_path) == [tokenizer.tokenize(f"body {i}") for i in range(1, 4)]
    assert rows(tmp_path, "title") == [tokenizer.tokenize(f"t{i}") for i in range(4)]
    assert done.documents == 7


BROKEN = {
    "json": (b'{"text": "a"\n', "line 3: broken JSON at column"),
    "utf8": (b'{"text": "\xff"}\n', r"line 3: 'utf-8' codec can't decode"),
    "key": (b'{"other": "a"}\n', "line 3: no text under the key 'text'"),
    "type": (b'{"text": 7}\n', "line 3: no text under the key 'text'"),
    "list": (b'["text"]\n', "line 3: not a JSON object"),
    "surrogate": (b'{"text": "\\ud800"}\n', "line 3: .*surrogates not allowed"),
    "deep": (b"[" * 100_000 + b"\n", "line 3: the JSON is nested too deeply"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("workers", [1, 2])
def test_broken_documents(hf_model: str, tmp_path: Path, case: str, workers: int) -> None:
    """The error names file and line; nothing is written. With skip_broken they are skipped and counted."""
    line, message = BROKEN[case]
    good = b'{"text": "good text"}\n'
    path = tmp_path / "c.jsonl"
    path.write_bytes(good * 2 + line + good)
    tokenizer = build_tokenizer(None, hf_model)
    with pytest.raises(UserError, match=f"c.jsonl, {message}.*--skip-broken"):
        run(tokenizer, tmp_path, str(path), workers=workers)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.jsonl"]
    done = run(tokenizer, tmp_path, str(path), workers=workers, skip_broken=True)
    assert rows(tmp_path) == [tokenizer.tokenize("good text")] * 3
    assert len(done.broken) == 1 and "c.jsonl, line 3" in done.broken[0]


def test_broken_text_file_names_the_line(hf_model: str, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    with pytest.raises(UserError, match=r"c\.txt, line 3: 'utf-8'"):
        run(build_tokenizer(None, hf_model), tmp_path, str(tmp_path / "c.txt"))


def test_bad_input(hf_model: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(None, hf_model)
    good = write_jsonl(tmp_path / "good.jsonl", ["text"])
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "short.jsonl.xz").write_bytes(lzma.compress(b'{"text": "abc"}\n' * 99)[:-30])
    (tmp_path / "wrong.jsonl.gz").write_bytes(b"plain")
    (tmp_path / "table.csv").write_text("a,b")
    cases: list[tuple[str, dict[str, Any], str]] = [
        (str(tmp_path / "absent.jsonl"), {}, "no such file"),
        (str(tmp_path), {}, "is a directory"),
        (str(tmp_path / "table.csv"), {}, "unknown suffix"),
        (str(tmp_path / "empty.jsonl"), {}, "corpus is empty"),
        (str(tmp_path / "short.jsonl.xz"), {}, "short.jsonl.xz is truncated"),
        (str(tmp_path / "wrong.jsonl.gz"), {}, "wrong.jsonl.gz cannot be read"),
        (good, {"workers": 0}, "--workers"),
        (good, {"json_keys": ["text", "text"]}, "twice"),
    ]
    for path, settings, message in cases:
        with pytest.raises(UserError, match=message):
            run(tokenizer, tmp_path, path, **settings)
    assert not list(tmp_path.glob("out*"))


def test_existing_output_is_kept(hf_model: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(None, hf_model)
    run(tokenizer, tmp_path, write_jsonl(tmp_path / "a.jsonl", ["first"]))
    before = (tmp_path / "out_text_document.bin").read_bytes()
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n{"text": \n')
    with pytest.raises(UserError, match="--overwrite"):
        run(tokenizer, tmp_path, str(tmp_path / "b.jsonl"))
    with pytest.raises(UserError, match="line 2"):
        run(tokenizer, tmp_path, str(tmp_path / "b.jsonl"), overwrite=True)
    assert (tmp_path / "out_text_document.bin").read_bytes() == before
    run(tokenizer, tmp_path, str(tmp_path / "b.jsonl"), overwrite=True, skip_broken=True)
    assert rows(tmp_path) == [tokenizer.tokenize("second")]


def test_gigatoken_is_used_where_it_agrees(hf_model: str, sp_model: str) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken, an optional dependency, is not installed")
    tokenizer = build_tokenizer(None, hf_model)
    assert isinstance(choose_encoder(tokenizer, sentences(5))[0], GigatokenEncoder)
    assert isinstance(choose_encoder(tokenizer, [], fast=False)[0], HuggingFaceEncoder)
    assert "sentencepiece" in choose_encoder(build_tokenizer(None, sp_model), [])[1]


def test_one_different_id_selects_the_reference(hf_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken, an optional dependency, is not installed")
    right = GigatokenEncoder.encode

    def wrong(self: GigatokenEncoder, texts: list[str]) -> Encoded:
        ids, lengths, _ = right(self, texts)
        return Encoded(np.where(np.arange(len(ids)) == len(ids) - 1, 3, ids), lengths)

    monkeypatch.setattr(GigatokenEncoder, "encode", wrong)
    encoder, reason = choose_encoder(build_tokenizer(None, hf_model), ["the fox"])
    assert isinstance(encoder, HuggingFaceEncoder)
    assert "other ids for 'the fox'" in reason


def _wrong_for(word: str, right):
    """Return a gigatoken encoder that gives a wrong last id to each text that contains ``word``."""

    def encode(self: GigatokenEncoder, texts: list[str]) -> Encoded:
        ids, lengths, _ = right(self, texts)
        wrong = np.cumsum(lengths)[[word in text for text in texts]] - 1
        return Encoded(np.where(np.isin(np.arange(len(ids)), wrong), 3, ids), lengths)

    return encode


@pytest.mark.parametrize("workers", [1, 2])
def test_a_wrong_id_within_the_corpus_ends_preprocessing(
    hf_model: str, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch, run_tool, capsys
) -> None:
    """The choice of the encoder compares only the first pieces. The spot check compares an entire chunk."""
    pytest.importorskip("gigatoken", reason="gigatoken, an optional dependency, is not installed")
    right = GigatokenEncoder.encode
    monkeypatch.setattr(GigatokenEncoder, "encode", _wrong_for("zebra", right))
    corpus = write_jsonl(tmp_path / "c.jsonl", [*sentences(200), "a" * 3000 + " and a zebra", "the end"])
    command = ["--input", corpus, "--output-prefix", str(tmp_path / "out"), "--tokenizer-model", hf_model]
    command += ["--workers", str(workers)]
    assert run_tool("preprocess_data", *command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: gigatoken gives other ids") and "and a zebra'" in error
    assert f"{corpus}, line 1 to 202" in error and len(error) < 400 and "--encoder reference" in error
    assert not list(tmp_path.glob("out*"))
    assert run_tool("preprocess_data", *command, "--encoder", "reference") == 0


def test_one_chunk_in_a_thousand_is_compared(
    hf_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_tool, capsys
) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken, an optional dependency, is not installed")
    assert module.CHUNKS_PER_CHECK == 1000
    monkeypatch.setattr(module, "CHUNK_BYTES", 512)
    texts = sentences(200)
    command = ["--output-prefix", str(tmp_path / "out"), "--tokenizer-model", hf_model, "--overwrite"]
    command += ["--input", write_jsonl(tmp_path / "c.jsonl", texts)]
    monkeypatch.setattr(module, "CHUNKS_PER_CHECK", 10)
    for workers in ("1", "3"):
        assert run_tool("preprocess_data", *command, "--workers", workers) == 0
        output = capsys.readouterr().out
        checked, chunks = re.search(r"spot-checked (\d+) of (\d+) chunks", output).groups()
        assert int(chunks) > 50 and int(checked) == (int(chunks) + 9) // 10
    # gigatoken gets two words wrong: the one in chunk 9 passes, the one in chunk 10 is found.
    monkeypatch.setattr(GigatokenEncoder, "encode", _wrong_for("zebra", GigatokenEncoder.encode))
    path, chunks = tmp_path / "c.jsonl", list(read_chunks(tmp_path / "c.jsonl", 512))
    start, data = sum(len(chunk.data) for chunk in chunks[:10]), path.read_bytes()
    assert b"quick" in chunks[9].data and b"brown" in chunks[10].data
    place = data.rindex(b"quick", 0, start)
    path.write_bytes(data[:place] + b"zebra" + data[place + 5 :])
    assert run_tool("preprocess_data", *command, "--workers", "1") == 0
    place = data.index(b"brown", start)
    path.write_bytes(data[:place] + b"zebra" + data[place + 5 :])
    assert run_tool("preprocess_data", *command, "--workers", "1") == 2
    assert f"{path}, line {chunks[10].first_line} to" in capsys.readouterr().err
    assert run_tool("preprocess_data", *command, "--workers", "1", "--encoder", "reference") == 0
    assert "spot-checked" not in capsys.readouterr().out


def test_neox_ids_of_real_and_odd_text(shared_dir: Path) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken, an optional dependency, is not installed")
    tokenizer = build_tokenizer(None, str(shared_dir / "data/tokenizer/20B_tokenizer.json"))
    with lzma.open(shared_dir / "data/text/peps.jsonl.xz") as file:
        texts = [json.loads(line)["text"][:3000] for line, _ in zip(file, range(150), strict=False)]
    texts += [*ODD, *probe_texts(tokenizer)]
    assert first_difference(GigatokenEncoder(tokenizer), HuggingFaceEncoder(tokenizer), texts) is None


def test_command_line(hf_model: str, tmp_path: Path, run_tool, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "a b"}\nnonsense\n')
    command = [
        "--input",
        str(corpus),
        "--output-prefix",
        str(tmp_path / "out"),
        "--tokenizer-model",
        hf_model,
    ]
    assert run_tool("preprocess_data", *command, "--workers", "1") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {corpus}, line 2")
    assert run_tool("preprocess_data", *command, "--workers", "2", "--skip-broken") == 0
    output = capsys.readouterr()
    assert "encoder: " in output.err and "skipped 1 broken documents" in output.out
    assert rows(tmp_path) == [build_tokenizer(None, hf_model).tokenize("a b")]
