"""A SentencePiece model as a ``tokenizer.json``, which is what transformers reads."""

from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from megatron_mesh.errors import UserError

_SPACE = "▁"
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_CONTROL, _USER_DEFINED = 3, 4  # ModelProto.SentencePiece.Type

# The result is tried on these before it is trusted.
_SAMPLES = (
    "It was a dark and stormy night;  the rain fell in torrents.\n\nExcept at 12:30, naïve café, 3.14159\n",
    "def f(x):\n    return [y**2 for y in x]  # 平方 → ok\n\tif True:\n\t\tpass\r\n",
    "  two spaces first, Ärger, Привет, \U0001f600 \x7f and one last ",
)


def to_fast_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of the ``tokenizers`` library with the same ids.

    Raises:
        UserError: the model's kind has no counterpart there, or does not give the same ids.
    """
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(original.serialized_model_proto())
    tokenizer = Tokenizer(_model(proto, path))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec))
    tokenizer.decoder = _decoder(proto)
    for piece in proto.pieces:
        if piece.type in (_CONTROL, _USER_DEFINED):
            special = piece.type == _CONTROL
            text = piece.piece.replace(_SPACE, " ") if not special else piece.piece
            tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)])
    _check(tokenizer, original, path)
    return tokenizer


def _model(proto: Any, path: Path) -> models.Model:
    trainer = proto.trainer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if trainer.model_type == _UNIGRAM:
        return models.Unigram(pieces, trainer.unk_id, trainer.byte_fallback)
    if trainer.model_type != _BPE:
        raise UserError(f"{path} is neither a BPE nor a unigram model, and transformers reads no other")
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    merges = [
        (-score, ids[text], (text[:cut], text[cut:]))
        for text, score in pieces
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    ordered = [pair for *_, pair in sorted(merges, key=lambda merge: merge[:2])]
    return models.BPE(
        ids, ordered, unk_token=trainer.unk_piece, fuse_unk=True, byte_fallback=trainer.byte_fallback
    )


def _normalizers(spec: Any) -> list[normalizers.Normalizer]:
    found: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        found.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        found += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        found.append(normalizers.Prepend(" "))
    return [*found, normalizers.Replace(" ", _SPACE)]


def _decoder(proto: Any) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _check(tokenizer: Tokenizer, original: sentencepiece.SentencePieceProcessor, path: Path) -> None:
    for text in _SAMPLES:
        if tokenizer.encode(text, add_special_tokens=False).ids != original.encode(text):
            raise UserError(
                f"{path} cannot be written for transformers: as a tokenizer.json it gives other ids; convert "
                "with --tokenizer-model and a tokenizer.json of your own"
            )
