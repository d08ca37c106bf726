"""Training, exports and tools/generate.py give the same ids for any text."""

import itertools
import json
import random
import runpy
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from megatron_mesh.data.encode import texts_with
from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert import export_tokenizer as tokenizer_module
from megatron_mesh.hf.convert.export_tokenizer import NEW_TOKEN, padding_of, read_tokenizer
from megatron_mesh.hf.convert.spm import to_fast_tokenizer
from tests.unit.hf.tokenizers_of_tests import SENTENCEPIECE, Pair, byte_level, export_tokenizer, models_in

ROOT = Path(__file__).resolve().parents[3]
KINDS = [*SENTENCEPIECE, "json", "json-start", "json-end", "json-words"]
WRITTEN = [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<sep>",
    "<cls>",
    "<mask>",
    "<0x0A>",
    "<|endoftext|>",
    "<|padding|>",
]
WRITTEN += [
    "<note>",
    "a b",
    "  x",
    "\u2581",
    "\x00",
    "\ufeff",
    "\xa0",
    "\u2028",
    "\r\n",
    " ",
    "   ",
    "\n",
    "def",
    "**",
]
WRITTEN += ["e\u0301", "\u1112\u1161\u11ab", "\ufb01", "\U0001f469\u200d\U0001f467"]
TEXTS = st.lists(st.one_of(st.sampled_from(WRITTEN), st.text(max_size=8)), max_size=12).map("".join)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    directory = tmp_path_factory.mktemp("tokenizers")
    return {name: export_tokenizer(path, directory / name) for name, path in models_in(directory)}


@pytest.fixture(scope="module")
def prompt_ids() -> Callable[[Pair, str], list[int]]:
    """Return the ids that ``tools/generate.py`` passes to the model for a prompt."""
    continued = runpy.run_path(str(ROOT / "tools/generate.py"))["_continued"]
    arguments = Namespace(temperature=0, num_beams=1, max_new_tokens=1)

    class Model:
        device = "cpu"

        def generate(self, ids: torch.Tensor, **options: object) -> torch.Tensor:
            self.ids = ids[0].tolist()
            return ids

    def get(pair: Pair, prompt: str) -> list[int]:
        model = Model()
        assert continued(model, read_tokenizer(pair.directory), prompt, arguments) == ""
        return model.ids

    return get


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_any_text(pairs, kind, text) -> None:
    pair = pairs[kind]
    ids = pair.trained.tokenize(text)
    assert pair.exported(text)["input_ids"] == ids
    assert pair.exported.encode(text, add_special_tokens=False) == ids
    assert pair.exported([text, "a"], padding=True)["input_ids"][0][-len(ids) or 99 :] == ids
    assert pair.exported.convert_tokens_to_ids(pair.exported.tokenize(text)) == ids


@pytest.mark.parametrize("kind", KINDS)
def test_awkward_texts(pairs, prompt_ids, tmp_path, kind) -> None:
    """Also after ``save_pretrained``, and as prompts, where an empty text becomes an end-of-text token."""
    pair = pairs[kind]
    pair.exported.save_pretrained(tmp_path)
    fast = not (pair.directory / "tokenization_mesh.py").exists()
    assert fast == SENTENCEPIECE.get(kind, ("", True))[1]
    saved = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=not fast)
    again = Pair(pair.trained, read_tokenizer(pair.directory), pair.directory)
    for text in texts_with(WRITTEN):
        ids = pair.trained.tokenize(text)
        assert saved(text)["input_ids"] == again.exported(text)["input_ids"] == ids
    for text in ("", *WRITTEN, "a </s> b", "<s>x", "<unk> z"):
        assert prompt_ids(pair, text) == (pair.trained.tokenize(text) or [pair.trained.eod])


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_skips_special_tokens(pairs, kind) -> None:
    pair = pairs[kind]
    end, pad = pair.trained.eod, pair.exported.pad_token_id
    ids = pair.trained.tokenize("def f(a): return b")
    text = pair.exported.decode(ids)
    if kind != "json-words":  # decoding doesn't preserve its text
        assert text == pair.trained.detokenize(ids) == "def f(a): return b"
    assert pair.exported.decode([pad, pad, *ids, end], skip_special_tokens=True) == text
    whole = pair.exported.decode([*ids, end, *ids])
    assert whole.startswith(text) and pair.exported.eos_token in whole


@pytest.mark.parametrize("kind", KINDS)
def test_only_padding_is_hidden_from_the_loss(pairs, kind) -> None:
    pair = pairs[kind]
    end = pair.trained.eod
    long, short = ([*pair.trained.tokenize(text), end] for text in ("def f(a): return a", "a"))
    collator = DataCollatorForLanguageModeling(pair.exported, mlm=False)
    batch = collator([{"input_ids": ids} for ids in (long, short)])
    for ids, labels in zip((long, short), batch["labels"].tolist(), strict=True):
        missing = len(long) - len(ids)
        assert labels == [-100] * missing + ids
    assert batch["attention_mask"].sum() == len(long) + len(short)


def test_which_padding_token(pairs) -> None:
    found = {kind: pair.exported.pad_token for kind, pair in pairs.items()}
    new = {"json", "json-words", "bpe-no-start"}
    assert {kind for kind, token in found.items() if token == NEW_TOKEN} == new
    assert found["json-end"] == "<|padding|>" and found["bpe-padding"] == "<pad>"
    assert found["json-start"] == found["bpe-plain"] == found["unigram-nmt"] == "<s>"
    for kind, pair in pairs.items():
        assert pair.exported.pad_token_id == padding_of(pair.trained).id != pair.trained.eod
        assert len(pair.exported) == pair.trained.vocab_size + (kind in new)


def test_a_tokenizer_without_added_tokens(tmp_path) -> None:
    content = json.loads(byte_level(tmp_path / "json.json").read_text(encoding="utf-8"))
    del content["added_tokens"]
    (tmp_path / "json.json").write_text(json.dumps(content), encoding="utf-8")
    pair = export_tokenizer(tmp_path / "json.json", tmp_path / "out")
    for text in texts_with(WRITTEN):
        assert pair.exported(text)["input_ids"] == pair.trained.tokenize(text)


def test_random_merges(tmp_path) -> None:
    """Models with overlapping pieces, on all texts of up to ten characters."""
    draw = random.Random(0)
    texts = ["".join(text) for n in range(11) for text in itertools.product("ab", repeat=n)]
    for _ in range(60):
        pieces = ["a", "b"]
        while len(pieces) < draw.randint(4, 9):
            pieces += {draw.choice(pieces) + draw.choice(pieces)} - set(pieces)
        longer = pieces[2:]
        draw.shuffle(longer)
        path = _model(tmp_path / "x.model", [*longer, "a", "b", "\u2581"])
        fast, original = (
            to_fast_tokenizer(path, 2),
            sentencepiece.SentencePieceProcessor(model_file=str(path)),
        )
        assert fast is not None
        assert [row.ids for row in fast.encode_batch(texts)] == original.encode(texts), longer


def _model(path: Path, pieces: list[str]) -> Path:
    proto = sentencepiece_model_pb2.ModelProto()
    for piece, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3)):
        proto.pieces.add(piece=piece, score=0, type=kind)
    for rank, piece in enumerate(pieces):
        proto.pieces.add(piece=piece, score=-rank, type=1)
    proto.trainer_spec.model_type = 2
    proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(proto.SerializeToString())
    return path


def test_what_transformers_cannot_reproduce_is_refused(tmp_path, monkeypatch) -> None:
    """A faulty conversion, and ids with a gap, in which transformers would put the padding token."""
    model = byte_level(tmp_path / "json.json", "<|endoftext|> $A")
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_module, "_without_template", lambda processor: processor)
        with pytest.raises(UserError, match=r"cannot export .*json: .* different ids .* --tokenizer-model"):
            export_tokenizer(model, tmp_path / "template")
    content = json.loads(model.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] += 30
    (tmp_path / "gap.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"padding tokens the ids 0 and 402, not 0 and 430; .* have no gaps"):
        export_tokenizer(tmp_path / "gap.json", tmp_path / "gap")
