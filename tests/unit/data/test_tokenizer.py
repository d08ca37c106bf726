"""Tokenizers: kinds, sizes, end of document, errors."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import models

from megatron_mesh.data import build_tokenizer, check_vocab
from megatron_mesh.errors import UserError
from tests.unit.data.corpora import sentences


def test_kind_follows_from_the_name(hf_model: str, sp_model: str) -> None:
    assert type(build_tokenizer(None, hf_model)).__name__ == "HuggingFaceTokenizer"
    assert type(build_tokenizer(None, str(Path(hf_model).parent))).__name__ == "HuggingFaceTokenizer"
    assert type(build_tokenizer(None, sp_model)).__name__ == "SentencePieceTokenizer"
    explicit = build_tokenizer("SentencePieceTokenizer", str(Path(sp_model).parent))
    assert type(explicit).__name__ == "SentencePieceTokenizer"


@pytest.mark.parametrize("model", ["hf_model", "sp_model"])
def test_text_survives_the_round_trip(model: str, request: pytest.FixtureRequest) -> None:
    tokenizer = build_tokenizer(None, request.getfixturevalue(model))
    for text in [*sentences(20, seed=5), "naïve café 日本 🙂", "a  b   c\n\n\td"]:
        ids = tokenizer.tokenize(text)
        assert tokenizer.detokenize(ids) == text
        assert max(ids) < tokenizer.vocab_size


def test_vocabulary_counts_added_tokens(hf_model: str, tmp_path: Path) -> None:
    backend = Backend.from_file(hf_model)
    before = build_tokenizer(None, hf_model).vocab_size
    backend.add_tokens(["<one>", "<two>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer(None, str(tmp_path / "tokenizer.json"))
    assert tokenizer.vocab_size == before + 2
    assert max(tokenizer.tokenize("x<two>")) == before + 1


def test_neox_tokenizer(shared_dir: Path) -> None:
    tokenizer = build_tokenizer(None, str(shared_dir / "data/tokenizer/20B_tokenizer.json"))
    assert (tokenizer.vocab_size, tokenizer.eod) == (50277, 0)


def test_end_of_document(hf_model: str, sp_model: str, tmp_path: Path) -> None:
    assert build_tokenizer(None, hf_model).eod == Backend.from_file(hf_model).token_to_id("<|endoftext|>")
    processor = sentencepiece.SentencePieceProcessor(model_file=sp_model)
    assert build_tokenizer(None, sp_model).eod == processor.eos_id()
    shutil.copy(hf_model, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|padding|>"}))
    assert build_tokenizer(None, str(tmp_path)).eod == Backend.from_file(hf_model).token_to_id("<|padding|>")


def test_identity_is_content_not_path(hf_model: str, tmp_path: Path) -> None:
    shutil.copy(hf_model, tmp_path / "other.json")
    here, there = build_tokenizer(None, hf_model), build_tokenizer(None, str(tmp_path / "other.json"))
    assert here.unique_identifiers == there.unique_identifiers


def test_larger_vocabulary_than_the_model(hf_model: str) -> None:
    tokenizer = build_tokenizer(None, hf_model)
    check_vocab(tokenizer, tokenizer.vocab_size)
    with pytest.raises(UserError, match=f"{tokenizer.vocab_size:,} ids"):
        check_vocab(tokenizer, tokenizer.vocab_size - 1)


def test_bad_input(hf_model: str, sp_model: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "bad.model").write_text("nonsense")
    (tmp_path / "tokenizer.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    backend = Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.save(str(tmp_path / "no_eod.json"))
    cases = [
        (None, None, "--tokenizer-model"),
        ("GPT2Tokenizer", hf_model, "is unknown; choose from"),
        (None, str(tmp_path / "absent.json"), "does not exist"),
        (None, str(tmp_path / "bad.json"), "not a readable tokenizer.json"),
        (None, str(tmp_path / "bad.model"), "not a readable SentencePiece"),
        (None, str(tmp_path / "tokenizer.txt"), "is not a .json file"),
        (None, str(tmp_path / "empty"), "holds no tokenizer.json or tokenizer.model"),
        (None, str(tmp_path / "no_eod.json"), "no end-of-document token"),
        ("HuggingFaceTokenizer", sp_model, "is not a .json file"),
    ]
    for kind, model, message in cases:
        with pytest.raises(UserError, match=message):
            build_tokenizer(kind, model)
