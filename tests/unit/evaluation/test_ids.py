"""Text gets the same ids as in training, for lm-eval's tasks and for the perplexity of texts."""

from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")

from megatron_mesh.data.tokenizer import build_tokenizer
from megatron_mesh.evaluation.model_source import checkpoint_source, huggingface_source, opened
from megatron_mesh.evaluation.perplexity import _pack
from megatron_mesh.hf.convert.export import export_checkpoint
from tests.exports import saved_with_logits
from tests.unit.hf.tokenizers_of_tests import SENTENCEPIECE, byte_level, sentencepiece_model

TEXTS = [
    "a </s> b",
    "<s>x",
    "<unk> z",
    "<|endoftext|>",
    "<|endoftext|> a",
    "\ufeffa\xa0b\u2028",
    "*******",
    "x  ",
]


@pytest.mark.parametrize("scheme", ["base", "vanilla"])
@pytest.mark.parametrize("kind", ["bpe-prefix", "unigram-symbols", "json"])
def test_ids(tmp_path: Path, kind: str, scheme: str) -> None:
    """No code in an export runs, not even that of its tokenizer."""
    if kind == "json":
        path = byte_level(tmp_path / "tokenizer.json", "<s> $A <|endoftext|>", ("<s>",))
    else:
        path = sentencepiece_model(tmp_path / "spm", **SENTENCEPIECE[kind][0])
    checkpoint, _ = saved_with_logits(
        tmp_path / "run", recurrence=scheme, layers={"vanilla": "2"}.get(scheme, "1+1R2+1"), seq_length=64,
        vocab_size=512, tokenizer_model=str(path),
    )  # fmt: skip
    export_checkpoint(checkpoint, tmp_path / "hf")
    for code in (tmp_path / "hf").glob("*.py"):
        code.write_text("raise RuntimeError('run')")
    trained = build_tokenizer(None, str(path))
    expected = [trained.tokenize(text) for text in TEXTS]
    how = {"device": "cpu", "dtype": "auto", "batch_size": 1, "max_length": None}
    for source in (
        checkpoint_source(checkpoint, None),
        huggingface_source(tmp_path / "hf", trust_remote_code=False),
    ):
        with opened(source, how) as lm:
            assert [lm.tok_encode(text) for text in TEXTS] == expected
            for text, ids in zip(TEXTS, expected, strict=True):
                assert lm.tok_batch_encode([text])[0][0].tolist() == ids
                context, whole = lm._encode_pair("def f", text)
                assert context + whole == trained.tokenize(f"def f{text}")
            packed = [trained.eod, *(i for ids in expected for i in (*ids, trained.eod))]
            assert _pack(TEXTS, lm.tokenizer, lm.eot_token_id).tolist() == packed
