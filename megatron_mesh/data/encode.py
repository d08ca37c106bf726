"""Encodes many texts at once, with the fastest library that gives the tokenizer's own ids.

gigatoken is fast; Hugging Face's tokenizers library is the reference. If both agree on a sample of the corpus
and on difficult texts, gigatoken is used, and spot checks compare it again during the work. Encoders are
single-threaded, since worker processes divide the work between cores.

Encodes texts of any length in bounded memory, with the same ids as encoding the entire text at once.

Tokenizers need 20 to 120 bytes of memory per byte of text. So a long text is encoded in overlapping windows,
and two neighbours are joined where they have the same tokens at the same positions. For byte-pair encoding,
two such tokens in a row prove that the result is right: a sequence of tokens is the encoding of its word
exactly if each pair of neighbours is. We require agreement over many more. A unigram model may still choose
differently between two segmentations with the same score, since rounding decides between them.
"""

from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import numpy as np

from megatron_mesh.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

_PROBES = [
    "".join(" " * n + "x" for n in range(1, 40)),
    "\t\t\n\n \n\r\n\r \x0b\x0c\x85\xa0\u2028\u3000\u200b\ufeff tail  ",
    "I'll we've they'RE it\u2019s 'Tis don't 'sword '\u00e9 1234567890 3.14159 1,000,000 \u00bd\u00b2",
    "cafe\u0301 A\u030a \u1e9b\u0323 \ufb01 \u212b \u1112\u1161\u11ab \uac00\u11a8 \u00df\u0130\u0131\u01c5",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31 \u05e9\u05b8\u05c1 \u0645\u064e \u0663",
    "\u4e2d\u6587\u3001\u65e5\u8a9e\u304b\u306a\u30ab\u30ca\u3002\ud55c\uad6d\uc5b4 \U00020000\U0002a6df",
    "\U0001f642\U0001f469\u200d\U0001f467\U0001f3fd \U0001f1eb\U0001f1f7 \u2764\ufe0f \U0001d400\U0010ffff",
    "\x00\x01\x1f\x7f\x80\ufffd\ufffe\ue000 <|endoftext|></s><s>[INST]<unk>\u2581 \u2581\u2581 \u0120",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2 != 3}  # ok\n\n\tpass\n" + "=" * 70 + "-" * 33,
    " both ends  ",
    "\ufeffstart a\xa0b\u2028c\u2029 end\xa0",
    "\n".join(mark * n for mark in "*)`_=0" for n in range(1, 20)),
    "https://example.org/a?b=c&d=%20#e user@example.org __init__ camelCaseWord ALLCAPS snake_case",
]


CHECKED_CHARACTERS = 1 << 20
"""Spot checks compare only the first part of a text, so that even a huge text takes about a second."""


class Encoded(NamedTuple):
    """The concatenated ids of documents."""

    ids: np.ndarray
    """[sum(lengths)]"""
    lengths: np.ndarray
    """[documents] int32"""
    cut: int = 0
    """Number of documents that had to be cut (``long_texts.py``). Their ids may be wrong at the cuts."""


class Located(NamedTuple):
    """The tokens of one text with their positions."""

    ids: np.ndarray
    """[tokens]"""
    starts: np.ndarray
    """[tokens] int64: the character in which each token starts. A token may begin in the middle of one."""


Locate = Callable[[str], Located | None]


class Encoder(Protocol):
    """Turns texts into ids, without start or end tokens."""

    def encode(self, texts: list[str]) -> Encoded:
        """Encode many texts."""

    def locators(self) -> list[Locate]:
        """Return functions that encode a text with token positions, in the order of preference.

        A function returns None if it cannot encode a text. The last one can encode any text.
        """


class GigatokenEncoder:
    """gigatoken, for byte-level BPE: 10 to 50 times as fast as the reference on one core.

    Raises:
        ImportError: gigatoken is not installed.
        ValueError, RuntimeError: it does not support this kind of tokenizer.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        import gigatoken

        self._backend = gigatoken.Tokenizer.from_json(tokenizer.path.read_bytes())
        self.reference = HuggingFaceEncoder(tokenizer)
        self._bytes = _token_bytes(tokenizer)

    def encode(self, texts: list[str]) -> Encoded:
        import awkward

        rows = self._backend.encode_batch(texts, parallel=False)
        return Encoded(awkward.to_numpy(awkward.flatten(rows)), awkward.to_numpy(awkward.num(rows)))

    def locators(self) -> list[Locate]:
        return [self._locate, *self.reference.locators()]

    def _locate(self, text: str) -> Located | None:
        """Compute token positions from the byte lengths of tokens, since gigatoken doesn't report positions.

        Returns None if the tokenizer normalizes the text, so that the lengths don't add up.
        """
        ids = self.encode([text]).ids
        ends = np.cumsum(self._bytes[ids])
        data = np.frombuffer(text.encode(), np.uint8)
        if len(ids) == 0 or ends[-1] != len(data):
            return None
        character = np.cumsum((data & 0xC0) != 0x80) - 1
        return Located(ids, character[np.concatenate([[0], ends[:-1]])])


class HuggingFaceEncoder:
    """Hugging Face's tokenizers library. TOKENIZERS_PARALLELISM=false keeps it single-threaded."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._backend = tokenizer.backend

    def encode(self, texts: list[str]) -> Encoded:
        return _joined([row.ids for row in self._backend.encode_batch_fast(texts, add_special_tokens=False)])

    def locators(self) -> list[Locate]:
        return [self.locate]

    def locate(self, text: str) -> Located:
        """Encode a text with token positions."""
        row = self._backend.encode(text, add_special_tokens=False)
        return Located(np.array(row.ids, np.int32), np.array(row.offsets, np.int64).reshape(-1, 2)[:, 0])


class SentencePieceEncoder:
    """sentencepiece's own batch encoder."""

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._backend = tokenizer.backend

    def encode(self, texts: list[str]) -> Encoded:
        return _joined(self._backend.encode(texts, num_threads=1))

    def locators(self) -> list[Locate]:
        return [self._locate]

    def _locate(self, text: str) -> Located:
        found = self._backend.encode(text, return_type="offset_mapping")
        starts = np.array(found["offsets"], np.int64).reshape(-1, 2)[:, 0]
        return Located(np.array(found["ids"], np.int32), starts)


def _token_bytes(tokenizer: HuggingFaceTokenizer) -> np.ndarray[Any, Any]:
    """Return the bytes per token, [vocabulary] int64, of a tokenizer that writes each byte as one letter."""
    sizes = np.zeros(tokenizer.vocab_size, np.int64)
    for token, number in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        sizes[number] = len(token)
    for number, added in tokenizer.backend.get_added_tokens_decoder().items():
        sizes[number] = len(added.content.encode())
    return sizes


def _joined(rows: list[list[int]]) -> Encoded:
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    ids = np.fromiter((token for row in rows for token in row), np.int32, int(lengths.sum()))
    return Encoded(ids, lengths)


def choose_encoder(tokenizer: Tokenizer, sample: list[str], *, fast: bool = True) -> tuple[Encoder, str]:
    """Return the fastest encoder that gives the tokenizer's own ids, with its name and the reason.

    Args:
        sample: texts from the corpus, a few KB, on which encoders are compared.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return SentencePieceEncoder(tokenizer), "sentencepiece, the tokenizer's own library"
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    reference = HuggingFaceEncoder(tokenizer)
    name = "Hugging Face tokenizers"
    if not fast:
        return reference, f"{name}, as requested"
    try:
        candidate = GigatokenEncoder(tokenizer)
    except ImportError:
        return reference, f"{name}: gigatoken is not installed"
    except (ValueError, RuntimeError) as error:
        return reference, f"{name}: gigatoken cannot read this tokenizer ({str(error).splitlines()[0]})"
    texts = probe_texts(tokenizer) + sample
    difference = first_difference(candidate, reference, texts)
    if difference is not None:
        return reference, f"{name}: gigatoken gives other ids for {difference!r:.80}"
    return candidate, f"gigatoken: same ids as {name} on {len(texts)} texts"


def first_difference(candidate: Encoder, reference: Encoder, texts: list[str]) -> str | None:
    """Return the first of ``texts`` for which two encoders differ, or None."""
    a, b = candidate.encode(texts), reference.encode(texts)
    rows = zip(texts, _rows(a), _rows(b), strict=True)
    return next((text for text, left, right in rows if not np.array_equal(left, right)), None)


def spot_check(encoder: Encoder, texts: list[str]) -> str | None:
    """Return the passage for which ``encoder`` gives other ids than its reference, or None.

    Compares the first ``CHECKED_CHARACTERS`` of each text. Encoders without a reference are references.
    """
    if not isinstance(encoder, GigatokenEncoder) or not texts:
        return None
    text = first_difference(encoder, encoder.reference, [text[:CHECKED_CHARACTERS] for text in texts])
    if text is None:
        return None
    found, expected = encoder.encode([text]).ids, encoder.reference.locate(text)
    shared = min(len(found), len(expected.ids))
    differing = np.flatnonzero(found[:shared] != expected.ids[:shared])
    token = int(differing[0]) if len(differing) else shared
    place = int(expected.starts[token]) if token < len(expected.starts) else len(text)
    return text[max(0, place - 20) : place + 40]


def _rows(encoded: Encoded) -> list[np.ndarray[Any, Any]]:
    return np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])


def probe_texts(tokenizer: HuggingFaceTokenizer) -> list[str]:
    """Return short texts on which tokenizers tend to differ, including the tokenizer's added tokens."""
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    return texts_with(added[:256])


def texts_with(symbols: list[str]) -> list[str]:
    """Return ``symbols`` alone and within text, white space, unusual Unicode, and repeated characters."""
    around = [f"a{t}b {t} {t}{t}\n{t}\t {t}. {t[:-1]} {t[1:]}" for t in symbols]
    return [*symbols, *around, *_PROBES]


_Ids = np.ndarray[Any, Any]

WINDOW = 1 << 20
"""Characters to encode at once."""
_OVERLAP = 1 << 13
_MARGIN = 1 << 10
"""Characters at the end of a window that are not compared: their tokens may depend on the text after it."""
_TRIES = 4
"""How many starting tokens to try for a window. Some tokenizers split long numbers in threes from their
start, so a window that begins inside a number may never agree."""


def encode_texts(encoder: Encoder, texts: list[str], window: int = WINDOW) -> Encoded:
    """Encode texts of any length. ``Encoded.cut`` counts those whose windows did not agree."""
    if all(len(text) <= window for text in texts):
        return encoder.encode(texts)
    ids: list[_Ids] = []
    lengths: list[int] = []
    cut = 0
    for long, group in groupby(texts, lambda text: len(text) > window):
        if not long:
            encoded = encoder.encode(list(group))
            ids.append(encoded.ids)
            lengths += encoded.lengths.tolist()
            continue
        for text in group:
            pieces, joints = _encode_long(encoder, text, window)
            ids += pieces
            lengths.append(sum(map(len, pieces)))
            cut += joints > 0
    return Encoded(np.concatenate(ids), np.array(lengths, np.int32), cut)


def _encode_long(encoder: Encoder, text: str, window: int) -> tuple[list[_Ids], int]:
    """Return the ids of a text in pieces, and the number of joints at which its windows disagree."""
    for locate in encoder.locators():
        result = _join_windows(locate, text, window)
        if result is not None:
            return result
    raise AssertionError("the last locator encodes any text")


def _join_windows(locate: Locate, text: str, window: int) -> tuple[list[_Ids], int] | None:
    """Do the work of ``_encode_long`` with one locator. Returns None if it cannot encode a window."""
    pieces: list[_Ids] = []
    start, cuts = 0, 0
    left = locate(text[:window])
    while left is not None and start + window < len(text):
        end = start + window
        overlap = left.starts[np.searchsorted(left.starts, end - min(_OVERLAP, window // 2)) :]
        for start in map(int, overlap[:_TRIES] if len(overlap) else [end]):
            right = locate(text[start : start + window])
            if right is None:
                return None
            right = Located(right.ids, right.starts + start)
            joint = _joint(left, right, start, end - min(_MARGIN, window // 8))
            if joint is not None:
                break
        else:
            joint = int(np.searchsorted(left.starts, start)), 0
            cuts += 1
        assert right is not None
        pieces.append(left.ids[: joint[0]])
        left = Located(right.ids[joint[1] :], right.starts[joint[1] :])
    return None if left is None else ([*pieces, left.ids], cuts)


def _joint(left: Located, right: Located, start: int, end: int) -> tuple[int, int] | None:
    """Return the indices in two windows from which both have the same tokens up to character ``end``.

    Returns None if they differ in the second half of their overlap, which begins at ``start``.
    """
    first, last = np.searchsorted(left.starts, [start, end])
    until = int(np.searchsorted(right.starts, end))
    length = min(last - first, until)
    a, b = slice(last - length, last), slice(until - length, until)
    same = (left.ids[a] == right.ids[b]) & (left.starts[a] == right.starts[b])
    differing = np.flatnonzero(~same)
    common = int(length if not len(differing) else length - 1 - differing[-1])
    if common < 2 or left.starts[last - common] > (start + end) // 2:
        return None
    return int(last - common), until - common
