"""SentencePiece's normalization without SentencePiece, for text in which it would change nothing but spaces.

The compiled rules of a model (`precompiled_charsmap`) are a double-array trie from byte strings to replacements. A rule can
apply only where its first two characters stand side by side, so text without any character that is a rule by itself or the
second one of a longer rule stays as it is, spaces aside. Everything else goes to SentencePiece.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from hpctrain.tokenize.spm import USER_DEFINED, SpmModel

_SPACE = "▁"
_SPACES = "\n\t\r\u00a0"  # what rules usually turn into a space, and text often holds


def make_normalizer(model: SpmModel, sp: Any) -> Callable[[Sequence[str]], list[str]]:
    """A function giving, for each of some texts, what `sp.normalize` gives, but with plain spaces and no dummy prefix.

    (Escaped, every text with a space would be stored with two bytes a character, and encoding it would cost twice as much.)
    """
    skip = 1 if model.add_dummy_prefix else 0

    def reference(texts: Sequence[str]) -> list[str]:
        return [text[skip:].replace(_SPACE, " ") for text in sp.normalize(list(texts))]

    if not (model.charsmap or model.remove_extra_whitespaces):
        return lambda texts: list(texts)
    if not model.remove_extra_whitespaces or USER_DEFINED in model.types:
        return reference
    careful = careful_characters(model.charsmap)
    needs_care = re.compile(f"[{_character_class(careful)}]").search
    spaces = [char for char in _SPACES if ord(char) not in careful]
    ascii_is_plain = not careful & set(range(0x20, 0x7F))

    def normalize(texts: Sequence[str]) -> list[str]:
        out: list[str] = []
        hard: list[int] = []
        for index, original in enumerate(texts):
            text = original
            for space in spaces:
                if space in text:
                    text = text.replace(space, " ")
            if not (ascii_is_plain and text.isascii() and text.isprintable()) and needs_care(text):
                hard.append(index)
                out.append("")
                continue
            while "  " in text:
                text = text.replace("  ", " ")
            out.append(text.strip(" "))
        for index, text in zip(hard, reference([texts[index] for index in hard]) if hard else ()):
            out[index] = text
        return out

    return normalize


def careful_characters(charsmap: bytes) -> set[int]:
    """Code points of text that only SentencePiece may normalize. Raises ValueError or IndexError when malformed.

    The usual spaces (`_SPACES`) are not among them where the rules turn them into a space, as they do in nmt_nfkc.
    """
    alone, second, spaces = _rules(charsmap) if charsmap else (set(), set(), set())
    usual = set(map(ord, _SPACES))
    return (alone | usual | {0, ord(_SPACE)}) - (spaces & usual) - {ord(" ")} | second


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


def _character_class(codes: set[int]) -> str:
    """The inside of a `[…]`. Beyond the BMP everything is taken: `re` looks those up one by one, which is slow."""
    return "".join(f"\\u{code:04x}" for code in sorted(codes) if code < 0x10000) + "\U00010000-\U0010ffff"
