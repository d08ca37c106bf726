"""Chooses the padding token of an export.

It is never the end-of-text token. Fine-tuning masks padding in the loss, so the model would not learn to
stop.

Writes the tokenizer of an export. It must give the same ids as in training, or the export is refused.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mesh.config.schema import DataConfig
from megatron_mesh.data.encode import texts_with
from megatron_mesh.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
    configured_token,
)
from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert.ship import TOKENIZER_CLASS, TOKENIZER_CODE
from megatron_mesh.runtime import strict_json

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


_FAST_CLASS = "PreTrainedTokenizerFast"  # exists in both transformers 4.57 and 5.x


def tokenizer_of(data: DataConfig, given: str | None) -> Tokenizer | None:
    """Return the tokenizer of a run, or the one at ``given`` instead; None if the run has no tokenizer.

    Raises:
        UserError: it was moved, or cannot be read.
    """
    if given is None and data.tokenizer_model is None:
        return None
    try:
        return build_tokenizer(None if given else data.tokenizer_type, given or data.tokenizer_model)
    except UserError as error:
        raise UserError(
            f"cannot load the run's tokenizer ({str(error).rstrip('.')}); if it was moved, give its path "
            "with --tokenizer-model"
        ) from error


def write_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int, padding: Padding) -> bool:
    """Write the files from which ``AutoTokenizer`` loads the tokenizer.

    Returns:
        Whether it needs the code in ``tokenization_mesh.py``, which the caller has to write.

    Raises:
        UserError: the tokenizer gives different ids in transformers than in training.
    """
    # With split_special_tokens, transformers doesn't recognize special tokens in text.
    end: str | None
    if isinstance(tokenizer, SentencePieceTokenizer):
        fast, split = _write_sentencepiece(tokenizer, directory), True
        end = tokenizer.backend.id_to_piece(tokenizer.eod)
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        fast, split = True, _write_json_tokenizer(tokenizer, padding, directory)
        end = tokenizer.backend.id_to_token(tokenizer.eod)
    settings: dict[str, Any] = {
        "tokenizer_class": _FAST_CLASS if fast else TOKENIZER_CLASS,
        "bos_token": end,
        "eos_token": end,
        "pad_token": padding.token,
        "split_special_tokens": split,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds token types by default
    }
    if not fast:
        settings["auto_map"] = {"AutoTokenizer": [f"{TOKENIZER_CODE}.{TOKENIZER_CLASS}", None]}
    (directory / "tokenizer_config.json").write_text(strict_json.dumps(settings, indent=2), encoding="utf-8")
    _check(tokenizer, directory, padding)
    return not fast


def read_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of an export as transformers does, but without running code in the directory."""
    from transformers import PreTrainedTokenizerFast  # takes seconds to import

    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if settings.get("tokenizer_class") == TOKENIZER_CLASS:
        from megatron_mesh.hf.modeling.tokenization_mesh import MeshTokenizer

        return MeshTokenizer.from_pretrained(str(directory))
    return PreTrainedTokenizerFast.from_pretrained(str(directory))


def _write_sentencepiece(tokenizer: SentencePieceTokenizer, directory: Path) -> bool:
    """Write tokenizer.json if it can give the same ids, else the model itself. Return whether it can."""
    from megatron_mesh.hf.convert.spm import to_fast_tokenizer  # needs protobuf, which training doesn't

    fast = to_fast_tokenizer(tokenizer.path, tokenizer.eod)
    if fast is None:
        shutil.copyfile(tokenizer.path, directory / "tokenizer.model")
    else:
        fast.save(str(directory / "tokenizer.json"))
    return fast is not None


def _write_json_tokenizer(tokenizer: HuggingFaceTokenizer, padding: Padding, directory: Path) -> bool:
    """Write a tokenizer.json that adds no tokens to a text and doesn't truncate it.

    Returns:
        Whether special tokens must be split. transformers makes the end-of-text token special, but training
        recognizes it in text only if it is an added token of the tokenizer.
    """
    content = json.loads(tokenizer.path.read_text(encoding="utf-8"))
    content["truncation"] = content["padding"] = None
    content["post_processor"] = _without_template(content.get("post_processor"))
    added = content["added_tokens"] = content.get("added_tokens") or []  # transformers needs the field
    split = tokenizer.eod not in {token["id"] for token in added}
    for token in added:
        if split:
            token["special"] = False  # so that it is recognized in text, as in training
        elif token["id"] in (tokenizer.eod, padding.id):
            token["special"] = True  # so that decoding can skip it
    (directory / "tokenizer.json").write_text(
        strict_json.dumps(content, ensure_ascii=False), encoding="utf-8"
    )
    return split


def _without_template(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a post-processor without its template of tokens to add: only byte-level offsets remain."""
    steps = [processor, *processor.get("processors", [])] if processor else []
    return next((step for step in steps if step["type"] == "ByteLevel"), None)


def _check(tokenizer: Tokenizer, directory: Path, padding: Padding) -> None:
    """Raise UserError if the export's tokenizer gives different ids in transformers than in training."""
    exported = read_tokenizer(directory)
    for text in texts_with(_symbols(tokenizer)):
        if exported(text, verbose=False)["input_ids"] != tokenizer.tokenize(text):
            raise UserError(
                f"cannot export {tokenizer.path}: for the text {text[:60]!r}, transformers gives different "
                "ids than training; convert with --tokenizer-model and your own tokenizer.json"
            )
    if (exported.eos_token_id, exported.pad_token_id) != (tokenizer.eod, padding.id):
        raise UserError(
            f"cannot export {tokenizer.path}: transformers gives its end-of-text and padding tokens the ids "
            f"{exported.eos_token_id} and {exported.pad_token_id}, not {tokenizer.eod} and {padding.id}; "
            "convert with --tokenizer-model and a tokenizer.json whose ids have no gaps"
        )


def _symbols(tokenizer: Tokenizer) -> list[str]:
    """Return the tokens that were not learned from text: added, control and user-defined ones."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    from megatron_mesh.hf.convert.spm import symbols

    return symbols(tokenizer.path)
