"""The Viterbi search of a unigram model, compiled when it is first needed: SentencePiece's own arithmetic, without its overhead.

SentencePiece takes the segmentation whose scores sum to the most (unigram_model.cc, EncodeOptimized). It adds them up in float32
from left to right, so that among nearly equal segmentations rounding decides, and what it decides depends on all that comes
before. No cache of words can follow that; the same additions and comparisons in the same order do, bit by bit. That is what
stands here: best score so far, pieces from each character on, shortest first, and the first of equals is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpctrain.data.spm import BYTE, NORMAL, SpmModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# sentencepiece 0.2.3 and later take sums beyond 100,000 back to 0 on the way, earlier ones do not: such spans are not for us.
_SUM_LIMIT = 90_000.0
_UNKNOWN_PENALTY = 10.0  # below the worst piece's score (kUnkPenalty)
_SPACE_UTF8 = "▁".encode()


class Viterbi:
    """Encodes NUL-separated normalized texts (UTF-8, plain spaces) of one model. Raises ImportError where numba is missing."""

    def __init__(self, model: SpmModel, separator: int, give_up: int):
        import numpy as np

        normal = model.ids_of_type(NORMAL)
        pieces = [model.pieces[index].replace("▁", " ").encode() for index in normal]
        self._trie = double_array(pieces, normal)
        self._scores = np.array(model.scores, dtype=np.float32)
        worst = self._scores[normal].min()
        self._unknown_score = np.float32(worst - np.float32(_UNKNOWN_PENALTY))
        # Without byte fallback, an unknown character is one id past the vocabulary; the caller merges runs of them.
        self._bytes = np.full(256, model.vocab_size, dtype=np.int32)
        for index in model.ids_of_type(BYTE):
            self._bytes[int(model.pieces[index][3:5], 16)] = index
        self._by_byte = model.byte_fallback
        self._separator, self._give_up = separator, give_up
        self._search = _compiled()

    def encode(self, text: bytes) -> NDArray[np.int32]:
        """The ids of all texts, each after one `separator` (there is one for each NUL); `give_up` alone for a text that only
        SentencePiece can encode.
        """
        import numpy as np

        data = np.frombuffer(text.replace(_SPACE_UTF8, b" "), dtype=np.uint8)
        begins = np.flatnonzero(data == 0)
        longest = int(np.diff(begins, append=len(data)).max()) + 4
        best, back, last = np.empty(longest, np.float32), np.empty(longest, np.int32), np.empty(longest, np.int32)
        ids = np.empty(len(data) + len(begins) + 4, np.int32)
        marks = np.array([self._separator, self._give_up], dtype=np.int32)
        used = self._search(
            data, begins, *self._trie, self._scores, self._unknown_score, self._bytes, self._by_byte, marks, best, back, last, ids
        )  # fmt: skip
        found: NDArray[np.int32] = ids[:used]
        return found


def _search(
    data: NDArray[np.uint8],
    begins: NDArray[np.int64],
    base: NDArray[np.int32],
    check: NDArray[np.int32],
    piece_at: NDArray[np.int32],
    scores: NDArray[np.float32],
    unknown_score: np.float32,
    byte_ids: NDArray[np.int32],
    by_byte: bool,
    marks: NDArray[np.int32],
    best: NDArray[np.float32],
    back: NDArray[np.int32],
    last: NDArray[np.int32],
    ids: NDArray[np.int32],
) -> int:
    """Fills `ids`; how many it used. `best[i]` is the score of the best segmentation of a text's first i bytes, `back[i]` where
    its last piece begins, `last[i]` that piece's id, -1 for an unknown character. Compiled by numba; float32 throughout.
    """
    used = 0
    for number in range(len(begins)):
        begin = begins[number] + 1
        size = (begins[number + 1] if number + 1 < len(begins) else len(data)) - begin
        ids[used] = marks[0]
        used += 1
        for at in range(size + 1):
            back[at] = -1
        best[0] = 0.0
        at = 0
        while at < size:
            here = best[at]
            if here > _SUM_LIMIT or here < -_SUM_LIMIT:
                break
            first = data[begin + at]
            width = 1 if first < 0xC0 else (2 if first < 0xE0 else (3 if first < 0xF0 else 4))
            alone = False
            node = 0
            end = at
            while end < size:
                child = base[node] + data[begin + end]
                if check[child] != node:
                    break
                node = child
                end += 1
                piece = piece_at[node]
                if piece >= 0:
                    score = scores[piece] + here
                    if back[end] == -1 or score > best[end]:
                        best[end] = score
                        back[end] = at
                        last[end] = piece
                    if end - at == width:
                        alone = True
            if not alone:
                end = at + width
                score = unknown_score + here
                if back[end] == -1 or score > best[end]:
                    best[end] = score
                    back[end] = at
                    last[end] = -1
            at += width
        if at < size:
            ids[used] = marks[1]
            used += 1
            continue
        count = 0
        end = size
        while end > 0:
            count += end - back[end] if last[end] < 0 and by_byte else 1
            end = back[end]
        place = used + count
        end = size
        while end > 0:
            if last[end] >= 0:
                place -= 1
                ids[place] = last[end]
            elif by_byte:
                for byte in range(end - 1, back[end] - 1, -1):
                    place -= 1
                    ids[place] = byte_ids[data[begin + byte]]
            else:
                place -= 1
                ids[place] = byte_ids[0]
            end = back[end]
        used += count
    return used


_ready: list[Callable[..., int]] = []


def _compiled() -> Callable[..., int]:
    """`_search` as machine code: half a second, once a process. Not kept on disk, as a container may have no place for it."""
    if not _ready:
        import numba

        _ready.append(numba.njit(_search))
    return _ready[0]


def double_array(pieces: list[bytes], ids: list[int]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(base, check, piece) of a trie of `pieces`: from node n by byte b to node base[n] + b if that one's check is n; the piece
    that ends at a node, or -1. The root is node 0.

    The layout of Aoe, "An Efficient Digital Search Algorithm by Using a Double-Array Structure" (1989).
    """
    import numpy as np

    children: list[dict[int, int]] = [{}]
    ends: dict[int, int] = {}
    for piece, number in zip(pieces, ids):
        node = 0
        for byte in piece:
            following = children[node].get(byte)
            if following is None:
                following = len(children)
                children[node][byte] = following
                children.append({})
            node = following
        ends[node] = number
    place = [0] * len(children)
    bases: dict[int, int] = {}
    check = {0: -1}
    # Bit i of `free`: place `window` + i is free. Whole numbers have any length, so thousands of places are tried at once.
    window, width = 1, 4096
    free = full = (1 << (width + 256)) - 1
    stack = [0]
    while stack:
        node = stack.pop()
        labels = sorted(children[node])
        if not labels:
            continue
        while True:
            fits = full >> 256
            for label in labels:
                fits &= free >> label
            if fits:
                break
            free = free >> width | full & ~(full >> width)
            window += width
        start = window + (fits & -fits).bit_length() - 1
        bases[place[node]] = start
        for label in labels:
            free &= ~(1 << (start + label - window))
            check[start + label] = place[node]
            place[children[node][label]] = start + label
            stack.append(children[node][label])
    size = max(check) + 257
    base_array, check_array, piece_array = (np.full(size, fill, dtype=np.int32) for fill in (0, -1, -1))
    base_array[list(bases)] = list(bases.values())
    check_array[list(check)] = list(check.values())
    piece_array[[place[node] for node in ends]] = list(ends.values())
    return base_array, check_array, piece_array
