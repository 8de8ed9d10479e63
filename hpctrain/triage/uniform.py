"""Stretches of a log that are nothing but step lines in which nothing is wrong: told by whole
blocks, at the speed of C.

Without digits, signs, blanks, line ends and the characters of progress bars, all step lines of one
program are the same text, and the bars between them are nothing. So a block is such a stretch when
what is left of it is that text over and over: any other line, and any `nan` or `inf`, leaves
letters behind. Three searches for a literal and what may not follow it then tell that no value of
it is out of bounds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

# Bytes: some 64 step lines, of which the last one is read; that tells a trend as well as every
# one
BLOCK = 16 * 1024
_DROPPED = bytes(sorted({*b"0123456789.+-eE \r\n%|/<>,?[]its:", *range(128, 256)}))
_EXPONENT, _PLAIN = rb"[1-9]\.\d+[eE][+-]0[01]", rb"[1-9]\d{0,2}(?:\.\d+)?|0\.0{0,4}[1-9]\d*"
_GOOD = {shape: rb"(?:" + shape + rb")(?![\w.+-])" for shape in (_EXPONENT, _PLAIN)}
_FIELD = re.compile(
    rb"([a-zA-Z_/'\" ,]*(?:[lL]oss|[nN]orm)['\"]?(?: ?[:=] ?| )['\"]?)([^\s|,}'\"]+)"
)
_NUMBER = re.compile(rb"[-+.]?\d|[-+]?(?i:nan|inf)")
_COUNTER = re.compile(rb"(?:skipped|nan) iterations: *([^ |]+)[ |]")


class Template(NamedTuple):
    """What the step lines of a stretch have in common. `key` stands before the loss in each of
    them."""

    skeleton: bytes
    key: bytes
    bad: tuple[re.Pattern[bytes], ...]
    zeros: tuple[bytes, ...]
    parse: Callable[[bytes], Any]
    anchor: int  # by which such a line is found


def skeleton(text: bytes) -> bytes:
    """`text` without what differs between step lines."""
    return text.translate(None, _DROPPED)


def template_of(line: bytes, parse: Callable[[bytes], Any], anchor: int) -> Template | None:
    """The template of a step line; None when a value of it is not good, or it tells no loss."""
    keys: dict[bytes, bytes] = {}
    for key, value in _FIELD.findall(line):
        if not _NUMBER.match(value):
            continue  # `loss scale: 1.0`
        good = _GOOD[_EXPONENT if b"e" in value.lower() else _PLAIN]
        if not re.match(good, value):
            return None
        keys[key] = re.escape(key) + rb"(?!" + good + rb")"
    losses = [key for key in keys if b"oss" in key]
    if not losses:
        return None
    zeros = []
    for found in _COUNTER.finditer(line):
        if found[1] != b"0":
            return None
        zeros.append(found[0])
    return Template(
        skeleton(line),
        losses[0],
        tuple(map(re.compile, keys.values())),
        tuple(dict.fromkeys(zeros)),
        parse,
        anchor,
    )


def uniform_end(text: bytes, start: int, template: Template) -> tuple[int, int]:
    """(end, number of steps) of the block of healthy step lines that begins at `start`; (start, 0)
    when there is none."""
    first = text.find(b"\n", text.find(template.key, start, start + BLOCK), start + BLOCK) + 1
    if not first or skeleton(text[start:first]) != template.skeleton:
        return start, 0
    end = text.rfind(b"\n", first, start + BLOCK) + 1 or first
    block = text[start:end]
    left = skeleton(block)
    count = len(left) // len(template.skeleton)
    if left != template.skeleton * count or not _healthy(block, count, template):
        return start, 0
    return end, count


def all_alike(lines: list[bytes], template: Template) -> bool:
    """Whether step lines that other lines stand between are all of the template, and healthy."""
    block = b"\n".join(lines) + b"\n"
    if skeleton(block) != template.skeleton * len(lines):
        return False
    return _healthy(block, len(lines), template)


def _healthy(block: bytes, count: int, template: Template) -> bool:
    if any(block.count(zero) != count for zero in template.zeros):
        return False
    return not any(bad.search(block) for bad in template.bad)
