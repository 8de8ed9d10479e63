"""SentencePiece's normalization without SentencePiece, for text in which it would change nothing but spaces.

The compiled rules of a model (`precompiled_charsmap`) are a double-array trie from byte strings to replacements. A rule can
apply only where its first two characters stand side by side, so text without any character that is a rule by itself or the
second one of a longer rule stays as it is, spaces aside. Everything else goes to SentencePiece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hpctrain.data.spm import USER_DEFINED, SpmModel

_SPACE = "▁"
_SPACES = "\n\t\r\u00a0"  # what rules usually turn into a space, and text often holds


def make_normalizer(model: SpmModel, sp: Any) -> Callable[[Sequence[str]], bytes]:
    """A function that joins texts, none with a NUL in it, with NULs into UTF-8: each normalized as by `sp.normalize`, but with
    plain spaces and no dummy prefix.

    One string for thousands of texts, as then most steps are one call for all of them.
    """
    dummy = 1 if model.add_dummy_prefix else 0
    text_only = slice(0, -dummy or None) if model.suffix_whitespace else slice(dummy, None)

    def reference(texts: Sequence[str]) -> list[bytes]:
        return [text[text_only].replace(_SPACE, " ").encode() for text in sp.normalize(list(texts))]

    if not (model.charsmap or model.remove_extra_whitespaces):
        return lambda texts: "\0".join(texts).encode()
    if not model.remove_extra_whitespaces or USER_DEFINED in model.types:
        return lambda texts: b"\0".join(reference(texts))
    import numpy as np

    careful = careful_characters(model.charsmap)
    needs_care = np.zeros(1 << 16, dtype=bool)
    needs_care[[code for code in careful if code < 1 << 16]] = True
    # Beyond the BMP everything is taken: there are few such rules, and UTF-16 shows only surrogates.
    needs_care[0xD800:0xE000] = True
    needs_care[0] = False
    spaces = [char for char in _SPACES if ord(char) not in careful]
    table = bytes(32 if chr(byte) in spaces and byte < 128 else byte for byte in range(256))

    def normalize(texts: Sequence[str]) -> bytes:
        joined = "\0".join(texts)
        raw = joined.encode()
        codes = np.frombuffer(raw, "u1") if joined.isascii() else np.frombuffer(joined.encode("utf-16-le"), "<u2")
        positions = np.flatnonzero(needs_care[codes])
        raw = raw.translate(table)
        if "\u00a0" in spaces:
            raw = raw.replace("\u00a0".encode(), b" ")
        raw = _squeeze(raw)
        if len(positions):
            hard = np.unique(np.searchsorted(np.flatnonzero(codes == 0), positions)).tolist()
            parts = raw.split(b"\0")
            for index, text in zip(hard, reference([texts[index] for index in hard])):
                parts[index] = text
            raw = b"\0".join(parts)
        return raw

    return normalize


def _squeeze(raw: bytes) -> bytes:
    """Runs of spaces become one, and none is left at the ends of the NUL-separated texts."""
    import numpy as np

    data = np.frombuffer(raw, "u1")
    space = data == 32
    drop = space.copy()
    drop[1:] &= space[:-1] | (data[:-1] == 0)
    data = data[~drop]
    ends = np.append(np.flatnonzero(data == 0), len(data))
    ends = ends[ends > 0]
    trailing = ends[data[ends - 1] == 32] - 1
    return (np.delete(data, trailing) if len(trailing) else data).tobytes()


def careful_characters(charsmap: bytes) -> set[int]:
    """Code points of text that only SentencePiece may normalize. Raises ValueError or IndexError when malformed.

    The usual spaces (`_SPACES`) are not among them where the rules turn them into a space, as they do in nmt_nfkc.
    """
    alone, second, spaces = _rules(charsmap) if charsmap else (set(), set(), set())
    usual = set(map(ord, _SPACES))
    return (alone | usual | {0, ord(_SPACE)}) - (spaces & (usual | {ord(" ")})) | second


def _rules(charsmap: bytes) -> tuple[set[int], set[int], set[int]]:
    """Code points that are a rule by themselves, that come second in a longer one, and whose own rule gives a space.

    `precompiled_charsmap` is the size of the trie (u32), the trie, and NUL-ended replacements. The trie is a Darts-clone double
    array: a unit holds its label (low byte), a leaf flag (bit 8) and an offset (bits 10 and up, shifted by 8 when bit 9 is
    set); the children of a node at position p lie at p ^ offset ^ label, its value at p ^ offset.
    """
    import numpy as np

    size = int.from_bytes(charsmap[:4], "little")
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    texts = charsmap[4 + size :]
    position = np.arange(len(units))
    labels = units & 0xFF
    bases = position ^ ((units >> 10) << ((units & 0x200) >> 6))
    real = np.flatnonzero((units < 1 << 31) & (labels > 0))
    parents = real ^ labels[real]  # where the children of the unit's parent begin
    order = np.argsort(parents, kind="stable")
    real, parents = real[order], parents[order]
    # A state: where a node's children begin, how many bytes the character still needs, its bits so far, is it the second?
    states = np.array([[bases[0], 0, 0, 0]], dtype=np.int64)
    alone: set[int] = set()
    second: set[int] = set()
    spaces: set[int] = set()
    while len(states):
        begins = np.searchsorted(parents, states[:, 0], "left")
        counts = np.searchsorted(parents, states[:, 0], "right") - begins
        which = np.repeat(np.arange(len(states)), counts)
        child = real[np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(begins, counts)]
        byte, (_, need, code, is_second) = labels[child], states[which].T
        starts = need == 0
        width = (byte >= 0xC0).astype(np.int64) + (byte >= 0xE0) + (byte >= 0xF0)
        code = np.where(starts, byte & np.array([0x7F, 0x1F, 0x0F, 0x07])[width], code << 6 | byte & 0x3F)
        need = np.where(starts, width, need - 1)
        whole = need == 0
        second.update(code[whole & (is_second == 1)].tolist())
        is_rule = whole & (is_second == 0) & ((units[child] >> 8) & 1 == 1)
        alone.update(code[is_rule].tolist())
        for at, number in zip(child[is_rule].tolist(), code[is_rule].tolist()):
            start = int(units[bases[at]]) & 0x7FFFFFFF
            if texts[start : start + 2] == b" \0":
                spaces.add(number)
        goes_on = ~(whole & (is_second == 1))
        code = np.where(whole, 0, code)
        following = np.stack([bases[child], need, code, is_second | whole], axis=1)
        states = np.unique(following[goes_on], axis=0)
    return alone, second, spaces
