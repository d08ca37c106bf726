"""Tokenizers from local files: a Hugging Face ``tokenizer.json`` or a SentencePiece ``.model``.

Megatron-core's classes don't work for us. Its HuggingFaceTokenizer uses transformers' AutoTokenizer, which
cannot open a bare ``tokenizer.json``. Both of its classes put the tokenizer's absolute path into the key of
the index cache, so a cache built on one node is not found on another. Our two classes have what
``GPTDataset`` and our tools need, under Megatron-core's names
(megatron/core/tokenizers/text/text_tokenizer.py).
"""

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path

import sentencepiece
import tokenizers

from megatron_mesh.errors import UserError

_END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>")


class Tokenizer(ABC):
    """Converts text to ids and back.

    ``vocab_size`` is the largest id + 1, including added tokens. ``eod`` is the id that ends a document.
    """

    vocab_size: int
    eod: int
    pad: int = -1
    """Not a token id, so GPTDataset takes no token for padding. Documents are packed, never padded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """Identifies the tokenizer in keys of the index cache, by its content instead of its path."""
        return {"class": type(self).__name__, "sha256": self._sha256}

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Encode ``text`` without start or end tokens. Special tokens in the text become their ids."""

    @abstractmethod
    def detokenize(self, ids: list[int]) -> str:
        """Decode ``ids``, including special tokens."""


class HuggingFaceTokenizer(Tokenizer):
    """A fast tokenizer of the ``tokenizers`` library."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"{path} is not a readable tokenizer.json: {error}") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        candidates = (*configured_token(path, "eos_token"), *_END_OF_DOCUMENT)
        self.eod = _first_known(candidates, {t: i for t, i in vocabulary.items() if t in candidates}, path)

    def tokenize(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def detokenize(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.backend = sentencepiece.SentencePieceProcessor()
        try:
            self.backend.Load(str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} is not a readable SentencePiece model: {error}") from error
        self.vocab_size = self.backend.get_piece_size()
        self.eod = self.backend.eos_id()
        if self.eod < 0:
            ids = {piece: self.backend.piece_to_id(piece) for piece in _END_OF_DOCUMENT}
            known = {piece: i for piece, i in ids.items() if self.backend.id_to_piece(i) == piece}
            self.eod = _first_known(_END_OF_DOCUMENT, known, path)

    def tokenize(self, text: str) -> list[int]:
        return self.backend.encode(text)

    def detokenize(self, ids: list[int]) -> str:
        return self.backend.decode(ids)


_CLASSES: dict[str, type[Tokenizer]] = {
    "HuggingFaceTokenizer": HuggingFaceTokenizer,
    "SentencePieceTokenizer": SentencePieceTokenizer,
}
_SUFFIXES = {"HuggingFaceTokenizer": ".json", "SentencePieceTokenizer": ".model"}
_FILES = {"HuggingFaceTokenizer": "tokenizer.json", "SentencePieceTokenizer": "tokenizer.model"}


def build_tokenizer(tokenizer_type: str | None, tokenizer_model: str | None) -> Tokenizer:
    """Open the tokenizer at ``tokenizer_model``: a file, or a directory that holds one.

    Without ``tokenizer_type``, the suffix decides: ``.json`` is Hugging Face's, ``.model`` SentencePiece's.

    Raises:
        UserError: the file is missing, unreadable or not of this type, or has no end-of-document token.
    """
    if tokenizer_model is None:
        raise UserError("no tokenizer; give a tokenizer.json or a SentencePiece .model as --tokenizer-model")
    if tokenizer_type is not None and tokenizer_type not in _CLASSES:
        raise UserError(f"--tokenizer-type {tokenizer_type} is unknown; choose from {', '.join(_CLASSES)}")
    path = Path(tokenizer_model)
    kinds = [tokenizer_type] if tokenizer_type else list(_CLASSES)
    if path.is_dir():
        found = [path / _FILES[kind] for kind in kinds if (path / _FILES[kind]).is_file()]
        if not found:
            wanted = " or ".join(_FILES[kind] for kind in kinds)
            raise UserError(f"the directory {path} holds no {wanted}; check --tokenizer-model")
        path = found[0]
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist; check --tokenizer-model")
    kind = next((kind for kind in kinds if path.suffix == _SUFFIXES[kind]), None)
    if kind is None:
        wanted = " or ".join(f"a {_SUFFIXES[k]} file ({k})" for k in kinds)
        raise UserError(f"tokenizer {path} is not {wanted}; check --tokenizer-model and --tokenizer-type")
    return _CLASSES[kind](path)


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise UserError if the tokenizer has ids beyond the ``vocab_size`` entries of the model."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size:,} ids, the model's vocabulary only "
            f"{vocab_size:,}; give the model's own tokenizer, or --vocab-size {tokenizer.vocab_size} or more"
        )


def configured_token(path: Path, name: str) -> tuple[str, ...]:
    """Return the token ``name``, such as ``eos_token``, from ``tokenizer_config.json`` next to the tokenizer.

    Returns () if there is none.
    """
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return ()
    try:
        token = json.loads(config.read_text(encoding="utf-8")).get(name)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config} is not a readable JSON object: {error}; correct or remove it") from error
    token = token.get("content") if isinstance(token, dict) else token
    return (token,) if isinstance(token, str) else ()


def _first_known(candidates: tuple[str, ...], ids: dict[str, int], path: Path) -> int:
    for token in candidates:
        if token in ids:
            return ids[token]
    raise UserError(
        f"the tokenizer {path} has no end-of-document token (none of {', '.join(candidates)}); name one as "
        "eos_token in a tokenizer_config.json next to it, or train the tokenizer with one"
    )
