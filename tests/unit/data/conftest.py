"""Small tokenizers and data sets for the tests."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_mesh.data.indexed import IndexedWriter
from tests.unit.data.corpora import sentences


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level BPE tokenizer.json with two special tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sentences(200), trainer)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    backend.save(str(path))
    return str(path)


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SentencePiece model of 320 pieces with byte fallback."""
    prefix = tmp_path_factory.mktemp("sp") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(200)),
        model_prefix=str(prefix),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return f"{prefix}.model"


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., str]:
    """Writes documents of numbers; ``make_data(name, documents, length, first)`` returns the prefix.

    All numbers in a data set differ, so each token identifies its position.
    """

    def make(name: str, documents: int = 40, length: int = 50, first: int = 1) -> str:
        prefix = str(tmp_path / name)
        numbers = np.arange(first, first + documents * length)
        with IndexedWriter(prefix, np.uint16) as writer:
            writer.add(numbers, np.full(documents, length))
            writer.commit()
        return prefix

    return make


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs tools/NAME.py with a command line in this process, and returns its exit code."""
    tools = Path(__file__).resolve().parents[3] / "tools"

    def run(name: str, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            runpy.run_path(str(tools / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1
        return 0

    return run
