"""Converts a SentencePiece model to a ``tokenizer.json``, if that gives the same ids for every text.

The ``tokenizers`` library can reproduce only some models exactly:

- No Unigram models. sentencepiece adds scores in float32 and the library in float64, so that they can choose
  different segmentations of equal score, e.g. of ``*******``.
- No normalization rules such as nmt_nfkc. The library applies them to whole graphemes.
- No user-defined symbols together with whitespace rules. The library would split a text at the symbols first
  and apply the rules to each part.
"""

from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

_SPACE = "▁"
_BPE = 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # ModelProto.SentencePiece.Type


def to_fast_tokenizer(path: Path, eod: int) -> Tokenizer | None:
    """Return a tokenizer of the ``tokenizers`` library with the same ids, or None if none can have them.

    Control symbols don't become added tokens, so that they are ordinary text, as in sentencepiece.

    Args:
        path: the SentencePiece model.
        eod: id of the token that ends a document.
    """
    proto = _read(path)
    merges = _merges(proto)
    if merges is None or proto.pieces[eod].type != _CONTROL or not _has_exact_rules(proto):
        return None
    trainer = proto.trainer_spec
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    unknown = next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback)
    )
    tokenizer.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec))
    tokenizer.decoder = _decoder(proto)
    user_defined = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(symbol, special=False, normalized=False) for symbol in user_defined])
    return tokenizer


def symbols(path: Path) -> list[str]:
    """Return the pieces of a model that were not learned from text, such as control symbols and bytes."""
    return [piece.piece for piece in _read(path).pieces if piece.type != _NORMAL]


def _read(path: Path) -> Any:
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    return proto


def _has_exact_rules(proto: Any) -> bool:
    """Whether the library can reproduce the normalization and the symbols of a model."""
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    user_defined = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    if spec.precompiled_charsmap or proto.denormalizer_spec.precompiled_charsmap:
        return False
    if trainer.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        return False
    if user_defined and (spec.add_dummy_prefix or spec.remove_extra_whitespaces):
        return False
    if any(_SPACE in symbol or " " in symbol for symbol in user_defined):
        return False
    # Unlike longer ones, control symbols of a single character are recognized in text by sentencepiece.
    reserved = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    return all(len(piece) > 1 for piece in reserved)


def _merges(proto: Any) -> list[tuple[str, str]] | None:
    """Return the merges of a BPE model in order of priority; None if it isn't BPE or has no unique order.

    sentencepiece ranks a merge by the score of its result, and of equal merges takes the leftmost. The
    library ranks pairs instead. If two pairs with the same result can overlap in a text (``x y`` and ``y z``
    with xy = yz), the pair on the left must come first. It is the one whose right half is also a prefix of
    the result.
    """
    if proto.trainer_spec.model_type != _BPE or any(piece.type == _UNUSED for piece in proto.pieces):
        return None
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    longer = sorted((text for text in scores if len(text) > 1), key=lambda text: -scores[text])
    if len({scores[text] for text in longer}) < len(longer):
        return None
    if any(character not in scores for text in longer for character in text):
        return None  # sentencepiece also merges characters that aren't pieces, the library doesn't
    ordered = []
    for text in longer:
        cuts = [cut for cut in range(1, len(text)) if text[:cut] in scores and text[cut:] in scores]
        cuts.sort(key=lambda cut: not text.startswith(text[cut:]))
        ordered += [(text[:cut], text[cut:]) for cut in cuts]
    return ordered


def _normalizers(spec: Any) -> list[normalizers.Normalizer]:
    found: list[normalizers.Normalizer] = []
    if spec.remove_extra_whitespaces:  # only spaces: other whitespace is ordinary text
        found += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        found.append(normalizers.Prepend(" "))
    found.append(normalizers.Replace(" ", _SPACE))
    if spec.remove_extra_whitespaces:  # also removes U+2581 itself, but only at the end
        found.append(normalizers.Replace(Regex(rf"{_SPACE}+\z"), ""))
    return found


def _decoder(proto: Any) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    spec = proto.normalizer_spec
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
