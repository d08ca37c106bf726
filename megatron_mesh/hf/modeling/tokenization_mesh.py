"""SentencePiece tokenizer for Hugging Face transformers (4.57 and 5.x) that calls sentencepiece itself.

transformers converts SentencePiece models for the tokenizers library, which normalizes some text differently
and breaks ties between segmentations differently. This class gives exactly the ids of sentencepiece.
"""

import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

_FILE = "tokenizer.model"


class MeshTokenizer(PreTrainedTokenizer):
    """Tokenizer with the ids of ``SentencePieceProcessor.encode``.

    As in sentencepiece, control symbols such as ``</s>`` in a text are ordinary text. Set
    ``split_special_tokens = False`` to read them as special tokens, for example for a chat template.

    Args:
        vocab_file (`str`):
            Path of the SentencePiece model.
        kwargs:
            Further arguments of [`PreTrainedTokenizer`].

    Raises:
        ValueError: ``vocab_file`` is not a SentencePiece model.
    """

    vocab_files_names = {"vocab_file": _FILE}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any):
        self.vocab_file = vocab_file
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocab_file))
        except RuntimeError as error:  # from_pretrained of transformers 4 would return False
            raise ValueError(f"{vocab_file} is not a readable SentencePiece model: {error}") from error
        kwargs.setdefault("split_special_tokens", True)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return self.pieces.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        pieces = {self.pieces.id_to_piece(index): index for index in range(self.vocab_size)}
        return {**pieces, **self.added_tokens_encoder}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of ``tokens``. Special tokens appear in it by name."""
        parts: list[str] = []
        for is_special, run in groupby(tokens, self._is_special):
            if is_special:
                parts += run
            else:
                parts.append(self._text([self.pieces.piece_to_id(token) for token in run], first=not parts))
        return "".join(parts)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = Path(save_directory) / (f"{filename_prefix}-{_FILE}" if filename_prefix else _FILE)
        if path.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, path)
        return (str(path),)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self.pieces.id_to_piece(index) for index in self.pieces.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces.id_to_piece(index)

    def _is_special(self, token: str) -> bool:
        index = self.pieces.piece_to_id(token)
        return self.pieces.id_to_piece(index) != token or self.pieces.is_control(index)

    def _text(self, ids: list[int], first: bool) -> str:
        if first:
            return self.pieces.decode(ids)
        # sentencepiece drops a space at the start of a text, so put an ordinary piece before these.
        before = next(self._ordinary_ids())
        return self.pieces.decode([before, *ids])[len(self.pieces.decode([before])) :]

    def _ordinary_ids(self) -> Iterator[int]:
        pieces = self.pieces
        kinds = (pieces.is_control, pieces.is_unknown, pieces.is_byte, pieces.is_unused)
        return (i for i in range(self.vocab_size) if not any(kind(i) for kind in kinds))
