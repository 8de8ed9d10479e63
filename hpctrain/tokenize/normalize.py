"""SentencePiece's normalization without SentencePiece, for text in which it would change nothing but spaces.

The compiled rules of a model (`precompiled_charsmap`) are a double-array trie from byte strings to replacements. A rule can
apply only where its first two characters stand side by side, so text without any character that is a rule by itself or the
second one of a longer rule stays as it is, spaces aside. Everything else goes to SentencePiece.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

from hpctrain.tokenize.spm import USER_DEFINED, SpmModel

_SPACE = "▁"


def make_normalizer(model: SpmModel, sp: Any) -> Callable[[list[str]], list[str]]:
    """A function giving what `sp.normalize` gives for each of some texts, usually faster."""
    prefix = _SPACE if model.add_dummy_prefix else ""
    if not (model.charsmap or model.remove_extra_whitespaces) and model.escape_whitespaces:
        return lambda texts: [prefix + text.replace(" ", _SPACE) if text else "" for text in texts]
    rules = None
    if model.remove_extra_whitespaces and model.escape_whitespaces and USER_DEFINED not in model.types:
        try:
            rules = read_rules(model.charsmap)
        except (IndexError, UnicodeDecodeError, struct.error, ValueError):
            rules = None
    if rules is None:
        return lambda texts: list(sp.normalize(texts))
    needs_care = re.compile("[" + "".join(map(re.escape, sorted(_careful(rules)))) + "]").search

    def normalize(texts: list[str]) -> list[str]:
        out: list[str] = []
        hard: list[str] = []
        for text in texts:
            if needs_care(text):
                hard.append(text)
                out.append("")
            else:
                words = text.split()
                out.append(prefix + _SPACE.join(words) if words else "")
        if hard:
            rest = iter(sp.normalize(hard))
            for index, text in enumerate(texts):
                if not out[index] and needs_care(text):
                    out[index] = next(rest)
        return out

    return normalize


def read_rules(charsmap: bytes) -> dict[str, str]:
    """Replacement by replaced text, from `precompiled_charsmap`: u32 size of the trie, the trie, NUL-ended replacements.

    The trie is a Darts-clone double array: a unit holds a label (low byte), a leaf flag (bit 8), an offset (bits 10 and up,
    shifted by 8 when bit 9 is set); a leaf's value is where its replacement starts. Raises when malformed.
    """
    import numpy as np

    if not charsmap:
        return {}
    (size,) = struct.unpack_from("<I", charsmap)
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    texts = charsmap[4 + size :]
    offsets = (units >> 10) << ((units & 0x200) >> 6)
    labels = units & 0x800000FF
    rules: dict[str, str] = {}
    # Level by level: where each node's children would begin, and the bytes that lead there.
    level: list[tuple[int, bytes]] = [(int(offsets[0]), b"")]
    every = np.arange(1, 256)
    while level:
        bases = np.array([base for base, _ in level])
        children = bases[:, None] ^ every[None, :]
        inside = children < len(units)
        is_child = inside & (labels[np.where(inside, children, 0)] == every[None, :])
        following: list[tuple[int, bytes]] = []
        for row, column in zip(*np.nonzero(is_child)):
            node, key = int(children[row, column]), level[row][1] + bytes([int(every[column])])
            base = node ^ int(offsets[node])
            if (int(units[node]) >> 8) & 1:
                start = int(units[base]) & 0x7FFFFFFF
                rules[key.decode("utf-8")] = texts[start : texts.index(b"\0", start)].decode("utf-8")
            following.append((base, key))
        level = following
        if len(rules) > 1_000_000:
            raise ValueError("too many rules")
    return rules


def _careful(rules: dict[str, str]) -> Sequence[str]:
    """Characters that only SentencePiece may handle. What becomes one space, and the space, `str.split` handles as well."""
    singles = {text for text in rules if len(text) == 1}
    spaces = {char for char in singles if rules[char] == " " and char.isspace()} | {" "}
    # A rule of two characters whose second is a space would need care wherever there is a space: none has one.
    seconds = {text[1] for text in rules if len(text) > 1}
    odd = {char for char in map(chr, range(0x3100)) if char.isspace()} - spaces
    return sorted((singles - spaces) | seconds | odd | {_SPACE, "\0"})
