"""Chooses the padding token of an export.

It is never the end-of-text token. Fine-tuning masks padding in the loss, so the model would not learn to
stop.
"""

from dataclasses import dataclass

from megatron_mesh.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    configured_token,
)

NEW_TOKEN = "<|megatron_mesh_padding|>"
"""Padding token for tokenizers that have no suitable one.

Unlike in training, a ``tokenizer.json`` recognizes it in text, so it has a name that no text contains.
"""

# Padding tokens first, then start tokens, which never occur in training data.
_NAMES = ("<|padding|>", "<pad>", "<|pad|>", "[PAD]", "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>")


@dataclass(frozen=True)
class Padding:
    """The padding token of an export."""

    token: str
    id: int
    is_new: bool = False
    """Whether the training's tokenizer lacks it. Its id is then the size of that tokenizer's vocabulary."""


def padding_of(tokenizer: Tokenizer) -> Padding:
    """Return a tokenizer's own padding token, or else its start token, or else a new token."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        pieces = tokenizer.backend
        for index in (pieces.pad_id(), pieces.bos_id()):
            if index >= 0 and index != tokenizer.eod and pieces.is_control(index):
                return Padding(pieces.id_to_piece(index), index)
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        ids = {token.content: i for i, token in tokenizer.backend.get_added_tokens_decoder().items()}
        # If the end-of-text token isn't an added token, the export splits special tokens (see
        # write_tokenizer). Then a token that training recognizes in text must not become special.
        unknown = (*configured_token(tokenizer.path, "unk_token"), "<unk>", "[UNK]")  # occurs in the data
        if tokenizer.eod in ids.values():
            for name in (*configured_token(tokenizer.path, "pad_token"), *_NAMES):
                if name in ids and ids[name] != tokenizer.eod and name not in unknown:
                    return Padding(name, ids[name])
    return Padding(NEW_TOKEN, tokenizer.vocab_size, is_new=True)
