"""Tokenizers of every kind, as used in training and as exported."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPTNeoXConfig

from megatron_mesh.data.tokenizer import Tokenizer as Trained
from megatron_mesh.data.tokenizer import build_tokenizer
from megatron_mesh.hf.convert.export_tokenizer import padding_of, write_tokenizer
from megatron_mesh.hf.convert.ship import tokenizer_source

ROOT = Path(__file__).resolve().parents[3]
SYMBOLS = {"user_defined_symbols": ["<sep>", "\n", "  x"], "control_symbols": ["<cls>", "<mask>"]}
IDENTITY = {"normalization_rule_name": "identity"}
PLAIN = {**IDENTITY, "add_dummy_prefix": False, "remove_extra_whitespaces": False}

# name: (options of the trainer, whether a stock class of transformers can give the same ids)
SENTENCEPIECE: dict[str, tuple[dict[str, Any], bool]] = {
    "bpe-plain": ({"model_type": "bpe", "byte_fallback": True, **PLAIN}, True),
    "bpe-newline": (
        {"model_type": "bpe", "byte_fallback": True, **PLAIN, "user_defined_symbols": ["\n", "<sep>"]},
        True,
    ),
    "bpe-prefix": ({"model_type": "bpe", **IDENTITY}, True),
    "bpe-prefix-bytes": ({"model_type": "bpe", "byte_fallback": True, **IDENTITY}, True),
    "bpe-spaces": ({"model_type": "bpe", **IDENTITY, "remove_extra_whitespaces": False}, True),
    "bpe-symbols": ({"model_type": "bpe", "byte_fallback": True, **IDENTITY, **SYMBOLS}, False),
    "bpe-nmt": ({"model_type": "bpe"}, False),
    "unigram-plain": ({"model_type": "unigram", "byte_fallback": True, **PLAIN}, False),
    "unigram-symbols": ({"model_type": "unigram", "byte_fallback": True, **SYMBOLS}, False),
    "unigram-nmt": ({"model_type": "unigram"}, False),
    "bpe-padding": ({"model_type": "bpe", **IDENTITY, "pad_id": 3}, True),
    "bpe-no-start": ({"model_type": "bpe", **IDENTITY, "bos_id": -1}, True),
}


@dataclass(frozen=True)
class Pair:
    """A tokenizer for training, and the one that transformers loads from its export."""

    trained: Trained
    exported: Any
    directory: Path


def lines() -> list[str]:
    files = sorted((ROOT / "megatron_mesh/data").rglob("*.py"))
    return [line for path in files for line in path.read_text(encoding="utf-8").splitlines(keepends=True)]


def sentencepiece_model(path: Path, **options: Any) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines()), model_prefix=str(path), vocab_size=512, minloglevel=2, **options
    )
    return path.with_name(f"{path.name}.model")


def byte_level(path: Path, template: str = "$A", special: tuple[str, ...] = (), size: int = 400) -> Path:
    """Write a byte-level BPE whose post-processor applies ``template``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines(), trainer)
    tokenizer.add_tokens([AddedToken("<note>", normalized=False), AddedToken("a b", single_word=True)])
    known = [(token, tokenizer.token_to_id(token)) for token in ("<|endoftext|>", *special)]
    adds = processors.TemplateProcessing(single=template, pair=f"{template} $B", special_tokens=known)
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), adds])
    tokenizer.enable_truncation(5)
    tokenizer.save(str(path))
    return path


def without_added_end_token(path: Path) -> Path:
    """Write a tokenizer whose end-of-text token isn't an added token, so ``<|endoftext|>`` is split."""
    words = ["<|endoftext|>", "?", "a", "b", "<", "|", ">", "endoftext", "<|", "|>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<note>", "<s>"])
    tokenizer.save(str(path))
    return path


def models_in(directory: Path) -> Iterator[tuple[str, Path]]:
    """Write tokenizers of all kinds and yield their names and paths."""
    for name, (options, _) in SENTENCEPIECE.items():
        yield name, sentencepiece_model(directory / name, **options)
    yield "json", byte_level(directory / "json.json")
    yield "json-start", byte_level(directory / "start.json", "<s> $A", ("<s>",))
    yield "json-end", byte_level(directory / "end.json", "$A <|endoftext|>", ("<|padding|>",))
    yield "json-words", without_added_end_token(directory / "words.json")


def export_tokenizer(model: Path, directory: Path) -> Pair:
    """Export only a tokenizer, next to the config.json of a plain model."""
    trained = build_tokenizer(None, str(model))
    directory.mkdir()
    needs_code = write_tokenizer(trained, directory, 64, padding_of(trained))
    GPTNeoXConfig(vocab_size=600).save_pretrained(directory)
    for name, text in tokenizer_source().items() if needs_code else ():
        (directory / name).write_text(text, encoding="utf-8")
    return Pair(trained, AutoTokenizer.from_pretrained(directory, trust_remote_code=needs_code), directory)
