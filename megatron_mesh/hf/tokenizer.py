"""The tokenizer in an export."""

import json
import shutil
from pathlib import Path

from megatron_mesh.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_mesh.hf.spm import to_fast_tokenizer


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
