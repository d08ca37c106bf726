"""Encodes texts of any length in bounded memory, with the same ids as encoding the entire text at once.

Tokenizers need 20 to 120 bytes of memory per byte of text. So a long text is encoded in overlapping windows,
and two neighbours are joined where they have the same tokens at the same positions. For byte-pair encoding,
two such tokens in a row prove that the result is right: a sequence of tokens is the encoding of its word
exactly if each pair of neighbours is. We require agreement over many more. A unigram model may still choose
differently between two segmentations with the same score, since rounding decides between them.
"""

from itertools import groupby
from typing import Any

import numpy as np

from megatron_mesh.data.encode import Encoded, Encoder, Locate, Located

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
