"""The merges of a BPE model, compiled when this module is imported and first used: for models whose pieces go across spaces.

gigatoken looks up words, which begin at spaces; where a piece holds the end of one word and the beginning of another, it has to
take a whole text for one word, and is three times as slow as SentencePiece.

SentencePiece's BPE merges the adjacent pair whose concatenation has the best score, leftmost first (bpe_model.cc,
SampleEncode). Two neighbouring characters that stand side by side in no piece are therefore never in one token, and text can be
cut between them: what is left and right of the cut is encoded as if it were alone. Such parts are a few bytes long, whatever the
script and wherever the spaces are, and most of them come again and again. So their ids are kept, in a table of fixed size.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from hpctrain.data.spm import BYTE, NORMAL, SpmModel

_SPACE, _SPACE_UTF8 = "▁", "▁".encode()
_KEPT_BYTES = 32  # a part is kept when it has no more bytes, as four words,
_KEPT_IDS = 11  # and no more ids
_KEPT_BITS = 17  # of the number of parts kept: 12 MiB
_PAIR_BITS = 23  # of the number of bits that tell which characters stand side by side: 1 MiB
_ROOM = 1 << 16  # characters of a part, for which there is room; texts with longer ones are left to SentencePiece
# Odd numbers that mix bits well (splitmix64, murmur3).
_PRIME, _MIX, _MIX2, _MIX3 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xFF51AFD7ED558CCD
_LEFT, _RIGHT = 0x9E3779B1, 0x85EBCA77


class Merges:
    """Encodes NUL-separated normalized texts (UTF-8, plain spaces) of one model. Raises ImportError where numba is missing."""

    def __init__(self, model: SpmModel, separator: int, give_up: int):
        normal = np.array(model.ids_of_type(NORMAL), dtype=np.int32)
        pieces = [model.pieces[index].replace(_SPACE, " ") for index in normal]
        self._pairs = _pair_bits("\0".join(pieces))
        by_score = np.argsort(-np.array(model.scores)[normal], kind="stable")
        self._table = _hash_table([pieces[index].encode() for index in by_score])
        self._ids = normal[by_score]
        # Without byte fallback, an unknown character is one id past the vocabulary; the caller merges runs of them.
        bytes_ids = np.full(256, model.vocab_size, dtype=np.int32)
        for index in model.ids_of_type(BYTE):
            bytes_ids[int(model.pieces[index][3:5], 16)] = index
        self._bytes, self._by_byte, self._marks = bytes_ids, model.byte_fallback, (separator, give_up)
        self._kept = np.zeros((1 << _KEPT_BITS, 4), np.uint64), np.zeros((1 << _KEPT_BITS, _KEPT_IDS + 1), np.int32)
        self._work = _room(_ROOM)

    def encode(self, text: bytes) -> NDArray[np.int32]:
        """The ids of all texts, each after one `separator` (there is one for each NUL); `give_up` alone for a text that only
        SentencePiece can encode.
        """
        data = np.frombuffer(text.replace(_SPACE_UTF8, b" "), dtype=np.uint8)
        ids = np.empty(len(data) + 2, np.int32)
        used = _encode(
            data, *self._marks, self._pairs, *self._table, self._ids, self._bytes, self._by_byte, *self._kept, *self._work, ids
        )  # fmt: skip
        found: NDArray[np.int32] = ids[:used]
        return found


def _room(size: int) -> tuple[NDArray[Any], ...]:
    """Room for the symbols of a part of `size` characters."""
    kinds = (np.int64, np.int64, np.int64, np.int64, np.int64, np.uint64)
    return (*(np.empty(size, kind) for kind in kinds), np.empty(3 * size, np.int64), np.empty(3 * size, np.int64))


def _pair_bits(text: str) -> NDArray[np.uint8]:
    """Bits by the hash of two characters: set for those side by side in `text`, and by chance for some others."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int64)
    # `_encode` leaves the marks in the first byte of a character in UTF-8 where they are.
    codes += np.select([codes >= 0x10000, codes >= 0x800, codes >= 0x80], [0xF0 << 18, 0xE0 << 12, 0xC0 << 6])
    left, right = codes[:-1], codes[1:]
    inside = (left != 0) & (right != 0)
    index = ((left[inside] * _LEFT ^ right[inside] * _RIGHT) & 0xFFFFFFFF) >> (32 - _PAIR_BITS)
    bits = np.zeros(1 << _PAIR_BITS, bool)
    bits[index] = True
    return np.packbits(bits, bitorder="little")


def _hash_table(pieces: list[bytes]) -> tuple[NDArray[Any], ...]:
    """(hashes, numbers, bytes of all pieces, where each begins, powers): a table with open addressing, of `pieces`.

    The hash of two strings one after the other comes from theirs: it is a polynomial of the bytes, modulo 2**64.
    """
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    arena = np.frombuffer(b"".join(pieces), np.uint8)
    begins = np.concatenate([[0], np.cumsum(lengths)])
    prime = np.uint64(_PRIME)
    hashes = np.zeros(len(pieces), np.uint64)
    for at in range(int(lengths.max())):
        longer = np.flatnonzero(lengths > at)
        hashes[longer] = hashes[longer] * prime + (arena[begins[longer] + at] + np.uint64(1))
    bits = int(4 * len(pieces)).bit_length()
    mask = (1 << bits) - 1
    keys, numbers = np.zeros(1 << bits, np.uint64), np.full(1 << bits, -1, np.int32)
    slots = _slot(hashes, mask)
    left = np.arange(len(pieces))
    while len(left):
        free = left[numbers[slots[left]] < 0]
        taken, first = np.unique(slots[free], return_index=True)
        keys[taken], numbers[taken] = hashes[free[first]], free[first]
        left = np.setdiff1d(left, free[first], assume_unique=True)
        slots[left] = (slots[left] + 1) & mask
    powers = np.ones(int(lengths.max()) + 1, np.uint64)
    np.multiply.accumulate(np.append(powers[:1], np.full(len(powers) - 1, prime)), out=powers)
    return keys, numbers, arena, begins, powers


def _slot(hashed: Any, mask: Any) -> Any:
    """Where in a table of `mask` + 1 places hashes belong; `_find_` says the same of one hash, in what numba knows."""
    return ((hashed ^ (hashed >> np.uint64(29))) * np.uint64(_MIX) >> np.uint64(32)).astype(np.int64) & mask


def _find_(hashed, data, begin, size, keys, numbers, arena, begins):  # type: ignore[no-untyped-def]
    """The number of the piece `data[begin : begin + size]`, whose hash is `hashed`, or -1."""
    mask = len(keys) - 1
    at = np.int64((hashed ^ (hashed >> np.uint64(29))) * np.uint64(_MIX) >> np.uint64(32)) & mask
    while numbers[at] >= 0:
        number = numbers[at]
        if keys[at] == hashed:
            start = begins[number]
            if begins[number + 1] - start == size:
                index = 0
                while index < size and arena[start + index] == data[begin + index]:
                    index += 1
                if index == size:
                    return number
        at = (at + 1) & mask
    return -1


def _push_(keys, sizes, count, key, size):  # type: ignore[no-untyped-def]
    """Add to a heap of `count` entries, the least first; the new count."""
    at = count
    while at > 0:
        above = (at - 1) >> 1
        if keys[above] <= key:
            break
        keys[at], sizes[at] = keys[above], sizes[above]
        at = above
    keys[at], sizes[at] = key, size
    return count + 1


def _pop_(keys, sizes, count):  # type: ignore[no-untyped-def]
    """Take the least entry out of a heap of `count` entries; the new count."""
    count -= 1
    key, size = keys[count], sizes[count]
    at = 0
    while True:
        below = 2 * at + 1
        if below >= count:
            break
        if below + 1 < count and keys[below + 1] < keys[below]:
            below += 1
        if keys[below] >= key:
            break
        keys[at], sizes[at] = keys[below], sizes[below]
        at = below
    keys[at], sizes[at] = key, size
    return count


def _join_(  # type: ignore[no-untyped-def]
    data, begin, end, keys, numbers, arena, begins, powers, starts, lengths, before, after, found, hashes, heap, heap_sizes,
):  # fmt: skip
    """Merge the characters of `data[begin:end]`; the symbols are those of `starts` that `after` links from 0 on, up to -1.

    `found` is the number of each symbol's piece, or -1.
    """
    longest = len(powers) - 1
    prime = np.uint64(_PRIME)
    count = np.int64(0)
    at = begin
    while at < end:
        first = data[at]
        width = 1 if first < 0xC0 else (2 if first < 0xE0 else (3 if first < 0xF0 else 4))
        hashed = np.uint64(0)
        for index in range(at, at + width):
            hashed = hashed * prime + (np.uint64(data[index]) + np.uint64(1))
        starts[count], lengths[count], hashes[count] = at, width, hashed
        before[count], after[count] = count - 1, count + 1
        found[count] = _find(hashed, data, at, width, keys, numbers, arena, begins)
        count += 1
        at += width
    after[count - 1] = -1
    waiting = np.int64(0)
    for left in range(count - 1):
        size = lengths[left] + lengths[left + 1]
        if size <= longest:
            hashed = hashes[left] * powers[lengths[left + 1]] + hashes[left + 1]
            number = _find(hashed, data, starts[left], size, keys, numbers, arena, begins)
            if number >= 0:
                waiting = _push(heap, heap_sizes, waiting, np.int64(number) << 32 | left, size)
    while waiting > 0:
        left, size, piece = heap[0] & 0xFFFFFFFF, heap_sizes[0], heap[0] >> 32
        waiting = _pop(heap, heap_sizes, waiting)
        right = after[left]
        if lengths[left] == 0 or right < 0 or lengths[left] + lengths[right] != size:
            continue
        hashes[left] = hashes[left] * powers[lengths[right]] + hashes[right]
        lengths[left], lengths[right] = size, 0
        found[left] = piece
        after[left] = after[right]
        if after[left] >= 0:
            before[after[left]] = left
        for turn in range(2):
            one = before[left] if turn == 0 else left
            if one < 0:
                continue
            other = after[one]
            if other < 0:
                continue
            size = lengths[one] + lengths[other]
            if size <= longest:
                hashed = hashes[one] * powers[lengths[other]] + hashes[other]
                number = _find(hashed, data, starts[one], size, keys, numbers, arena, begins)
                if number >= 0:
                    waiting = _push(heap, heap_sizes, waiting, np.int64(number) << 32 | one, size)


def _encode_(  # type: ignore[no-untyped-def]
    data, separator, give_up, pairs, keys, numbers, arena, begins, powers, ids_of, byte_ids, by_byte, kept_words, kept_ids,
    starts, lengths, before, after, found, hashes, heap, heap_sizes, ids,
):  # fmt: skip
    """Fills `ids`; how many it used."""
    used, at, end = 0, np.int64(0), len(data)  # a plain 0 has a type of its own, for which all would be compiled again
    words = np.zeros(4, np.uint64)
    mask = len(kept_ids) - 1
    room, text = len(starts), 0
    most = kept_ids.shape[1] - 1
    while at < end:
        if data[at] == 0:
            ids[used] = separator
            used += 1
            text = used
            at += 1
            continue
        begin, characters = at, 0
        code = 0
        words[0] = words[1] = words[2] = words[3] = 0
        while at < end:
            first = np.int64(data[at])
            if first == 0:
                break
            following, width = first, 1
            if first >= 0xC0:
                width = 2 if first < 0xE0 else (3 if first < 0xF0 else 4)
                for index in range(at + 1, at + width):
                    following = following << 6 | data[index] & 0x3F
            if characters:
                pair = ((code * _LEFT ^ following * _RIGHT) & 0xFFFFFFFF) >> (32 - _PAIR_BITS)
                if not pairs[pair >> 3] >> (pair & 7) & 1:
                    break
            size = at - begin
            if size + width <= _KEPT_BYTES:
                for index in range(width):
                    words[(size + index) >> 3] |= np.uint64(data[at + index]) << np.uint64(
                        (size + index) & 7
                    ) * np.uint64(8)
            code = following
            characters += 1
            at += width
        slot = 0
        size = at - begin
        if size <= _KEPT_BYTES:
            mixed = (
                words[0] * np.uint64(_PRIME)
                ^ words[1] * np.uint64(_MIX)
                ^ words[2] * np.uint64(_MIX2)
                ^ words[3] * np.uint64(_MIX3)
            )
            mixed ^= mixed >> np.uint64(31)
            slot = np.int64(mixed * np.uint64(_PRIME) >> np.uint64(33)) & mask
            if (
                kept_words[slot, 0] == words[0]
                and kept_words[slot, 1] == words[1]
                and kept_words[slot, 2] == words[2]
                and kept_words[slot, 3] == words[3]
            ):
                for index in range(kept_ids[slot, 0]):
                    ids[used] = kept_ids[slot, 1 + index]
                    used += 1
                continue
        if characters > room:
            ids[text] = give_up
            used = text + 1
            while at < end and data[at] != 0:
                at += 1
            continue
        _join(
            data, begin, at, keys, numbers, arena, begins, powers, starts, lengths, before, after, found, hashes, heap, heap_sizes,
        )  # fmt: skip
        old, symbol = used, 0
        while symbol >= 0:
            if found[symbol] >= 0:
                ids[used] = ids_of[found[symbol]]
                used += 1
            elif by_byte:
                for index in range(starts[symbol], starts[symbol] + lengths[symbol]):
                    ids[used] = byte_ids[data[index]]
                    used += 1
            else:
                ids[used] = byte_ids[0]
                used += 1
            symbol = after[symbol]
        if size <= _KEPT_BYTES and used - old <= most:
            for index in range(4):
                kept_words[slot, index] = words[index]
            kept_ids[slot, 0] = used - old
            for index in range(used - old):
                kept_ids[slot, 1 + index] = ids[old + index]
    return used


_inner = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
_find: Any = _inner(_find_)
_push: Any = _inner(_push_)
_pop: Any = _inner(_pop_)
_join: Any = _inner(_join_)
_encode: Any = numba.njit(_encode_)
