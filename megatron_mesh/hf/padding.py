"""The padding token of an export.

It is never the end-of-text token: fine-tuning hides padding from the loss, so the model would not learn to
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
"""For tokenizers that have none. Its name must not occur in text, so it is not a usual one."""

# Padding tokens first. Start tokens will do as well: training doesn't put them anywhere.
_NAMES = ("<|padding|>", "<pad>", "<|pad|>", "[PAD]", "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>")


@dataclass(frozen=True)
class Padding:
    """A padding token."""

    token: str
    id: int
    is_new: bool = False
    """Not in the tokenizer of the training: its id is the first after those."""


def padding_of(tokenizer: Tokenizer) -> Padding:
    """The padding token of a tokenizer: its own, else its start token, else a new one."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        pieces = tokenizer.backend
        for index in (pieces.pad_id(), pieces.bos_id()):
            if index >= 0 and index != tokenizer.eod and pieces.is_control(index):
                return Padding(pieces.id_to_piece(index), index)
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        ids = {token.content: i for i, token in tokenizer.backend.get_added_tokens_decoder().items()}
        # If the end-of-text token is not read from text, no special token of the export is.
        if tokenizer.eod in ids.values():
            for name in (*configured_token(tokenizer.path, "pad_token"), *_NAMES):
                if name in ids and ids[name] != tokenizer.eod:
                    return Padding(name, ids[name])
    return Padding(NEW_TOKEN, tokenizer.vocab_size, is_new=True)
