"""The tokenizer in an export."""

import json
import shutil
from pathlib import Path

from megatron_mesh.config.schema import DataConfig
from megatron_mesh.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
)
from megatron_mesh.errors import UserError
from megatron_mesh.hf.spm import to_fast_tokenizer


def tokenizer_of(data: DataConfig, given: str | None) -> Tokenizer | None:
    """The tokenizer of a run, or the one ``given`` in its place; None for a run on ids that named none.

    Raises:
        UserError: it is not where it was, or cannot be read.
    """
    if given is None and data.tokenizer_model is None:
        return None
    try:
        return build_tokenizer(None if given else data.tokenizer_type, given or data.tokenizer_model)
    except UserError as error:
        raise UserError(
            f"the tokenizer is missing ({error}) Say where it is now with --tokenizer-model."
        ) from error


def write_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write the files by which ``AutoTokenizer`` finds the tokenizer.

    Raises:
        UserError: it is a SentencePiece model that transformers' tokenizers cannot express.
    """
    end: str | None
    if isinstance(tokenizer, SentencePieceTokenizer):
        to_fast_tokenizer(tokenizer.path).save(str(directory / "tokenizer.json"))
        end = tokenizer.backend.id_to_piece(tokenizer.eod)
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        shutil.copyfile(tokenizer.path, directory / "tokenizer.json")
        end = tokenizer.backend.id_to_token(tokenizer.eod)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # which transformers 4.57 and 5.x both know
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds token types by default
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
