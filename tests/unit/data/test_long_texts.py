"""Texts longer than a window get the ids of the entire text, whatever the text looks like."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, trainers

from megatron_mesh.data import build_tokenizer
from megatron_mesh.data import preprocess as module
from megatron_mesh.data.encode import Encoder, GigatokenEncoder, Located, choose_encoder, encode_texts
from megatron_mesh.data.preprocess import PreprocessSettings, preprocess
from megatron_mesh.data.tokenizer import HuggingFaceTokenizer
from tests.unit.data.corpora import sentences, write_jsonl

WINDOW = 1024


def shapes(length: int) -> dict[str, str]:
    """Return texts of about ``length`` characters, including some without a place to cut."""
    pick = random.Random(3).choices
    return {
        "prose": " ".join(sentences(length // 100))[:length],
        "one letter": "x" * length,
        "two letters": "ab" * (length // 2),
        "one endless word": "".join(pick("etaoinshrdlu", k=length)),
        "digits": "".join(pick("0123456789", k=length)),
        "spaces": " " * length,
        "white space": "".join(pick(" \n\t", k=length)),
        "runs": "".join(letter * 150 for letter in pick("xyz ", k=length // 150)),
        "no letters of ours": "".join(pick("\u30a2\u30a4\u6f22\u5b57", k=length)),
        "emoji": "".join(pick(["\U0001f469\u200d\U0001f467\U0001f3fd", "\U0001f642"], k=length // 3)),
        "to be composed": "".join(pick(["e\u0301", "a", "\u1112\u1161\u11ab", " "], k=length // 2)),
        "special tokens": "".join(pick(["<|endoftext|>", "a ", "    "], k=length // 4)),
    }


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer like Llama 3's: NFC, and numbers split in threes from their start."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=_regex(r"\p{N}{1,3}| ?\p{L}+|\s+(?!\S)|\s+|."), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _trained(backend, tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def unsplit_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer like Llama 2's: no pretokenizer, so a document is one word."""
    backend = Backend(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return _trained(
        backend, tmp_path_factory.mktemp("unsplit"), ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    )


def _regex(pattern: str):
    from tokenizers import Regex

    return Regex(pattern)


def _trained(backend: Backend, directory: Path, special: list[str] | None = None) -> str:
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", *(special or [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if special is None else [],
        show_progress=False,
    )
    words = [f"{text[:200]} {i * 7919}" for i, text in enumerate(sentences(200))]
    backend.train_from_iterator(words, trainer)
    backend.save(str(directory / "tokenizer.json"))
    return str(directory / "tokenizer.json")


@pytest.mark.parametrize("model", ["hf_model", "sp_model", "digits_model", "unsplit_model"])
@pytest.mark.parametrize("fast", [True, False], ids=["fastest", "reference"])
def test_windows_give_the_ids_of_the_entire_text(
    model: str, fast: bool, request: pytest.FixtureRequest
) -> None:
    tokenizer = build_tokenizer(None, request.getfixturevalue(model))
    encoder = choose_encoder(tokenizer, [], fast=fast)[0]
    for name in shapes(1000):
        # If numbers are split in threes, only a long number shows whether two windows agree.
        window = 8 * WINDOW if (model, name) == ("digits_model", "digits") else WINDOW
        text = shapes(4 * window)[name]
        texts = ["before", text, text[:50], text[: 3 * window]]
        encoded = encode_texts(encoder, texts, window)
        expected = [tokenizer.tokenize(text) for text in texts]
        assert encoded.lengths.tolist() == [len(row) for row in expected], name
        assert encoded.ids.tolist() == [token for row in expected for token in row], name
        assert encoded.cut == 0, name


class Counted:
    """An encoder that records the size of every text."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.sizes = encoder, list[int]()

    def encode(self, texts: list[str]):
        self.sizes += map(len, texts)
        return self.encoder.encode(texts)

    def locators(self) -> list[Callable[[str], Located | None]]:
        def counted(locate):
            def run(text: str) -> Located | None:
                self.sizes.append(len(text))
                return locate(text)

            return run

        return [counted(locate) for locate in self.encoder.locators()]


@pytest.mark.parametrize("model", ["hf_model", "sp_model"])
@pytest.mark.parametrize("fast", [True, False], ids=["fastest", "reference"])
@pytest.mark.parametrize("shape", ["one endless word", "one letter", "prose"])
def test_work_grows_with_the_text_and_no_call_is_large(
    model: str, fast: bool, shape: str, request: pytest.FixtureRequest
) -> None:
    """For one endless word or line, four times the text takes four times the work."""
    tokenizer = build_tokenizer(None, request.getfixturevalue(model))
    work = []
    for size in (20_000, 40_000, 80_000):
        counted = Counted(choose_encoder(tokenizer, [], fast=fast)[0])
        encode_texts(counted, [shapes(size)[shape][:size]], WINDOW)
        assert max(counted.sizes) <= WINDOW
        work.append(sum(counted.sizes))
    assert work[1] < 2.1 * work[0] and work[2] < 2.1 * work[1]


def test_a_text_that_must_be_cut_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_tool, capsys
):
    """An unknown word is one token however long it is, so windows cannot agree on the ids."""
    backend = Backend(models.WordLevel({"[UNK]": 0, "<|endoftext|>": 1, "a": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr("megatron_mesh.data.encode.encode_texts.__defaults__", (WINDOW,))
    path = write_jsonl(tmp_path / "c.jsonl", ["a a", "a " * 2000, "x" * 3000, "a"])
    command = ["--input", path, "--output-prefix", str(tmp_path / "out"), "--workers", "1"]
    assert run_tool("preprocess_data", *command, "--tokenizer-model", str(tmp_path / "tokenizer.json")) == 0
    output = capsys.readouterr().out
    assert "cut 1 of 4 documents that were too long to encode whole; some" in output
    assert f"(first: {path}, line 1 to 4)" in output


@pytest.mark.parametrize("workers", [1, 2])
def test_a_corpus_with_long_lines(hf_model: str, tmp_path: Path, workers: int, monkeypatch) -> None:
    """Runs all of preprocessing with small chunks and windows."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 4096)
    monkeypatch.setattr("megatron_mesh.data.encode.encode_texts.__defaults__", (WINDOW,))
    tokenizer = build_tokenizer(None, hf_model)
    texts = [*sentences(20), *shapes(20_000).values(), *sentences(20)]
    settings = PreprocessSettings(
        [write_jsonl(tmp_path / "c.jsonl", texts)], str(tmp_path / "out"), workers=workers
    )
    done = preprocess(tokenizer, settings)
    assert np.fromfile(tmp_path / "out_text_document.bin", np.uint16).tolist() == [
        token for text in texts for token in tokenizer.tokenize(text)
    ]
    assert done.documents == len(texts) and done.cut == []


def test_gigatoken_locates_what_the_reference_locates(hf_model: str) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken, an optional dependency, is not installed")
    tokenizer = build_tokenizer(None, hf_model)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    backend = json.loads(Path(hf_model).read_text())
    assert backend["post_processor"] is None  # which might trim the reference's places
    encoder = GigatokenEncoder(tokenizer)
    for name, text in shapes(500).items():
        fast, slow = (locate(text) for locate in encoder.locators())
        assert fast is not None and slow is not None
        assert fast.ids.tolist() == slow.ids.tolist() and fast.starts.tolist() == slow.starts.tolist(), name
