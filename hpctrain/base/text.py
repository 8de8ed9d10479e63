"""Text that can be carried safely into scripts and files."""

from __future__ import annotations

MAX_TEXT = 10_000


def text_problem(value: str, multiline: bool = False) -> str:
    """Why a text cannot be carried safely, or an empty string: control characters, lone surrogates,
    length."""
    if len(value) > MAX_TEXT:
        return f"is longer than {MAX_TEXT} characters"
    if value.isascii() and value.isprintable():
        return ""
    allowed = "\n\t" if multiline else ""
    for char in value:
        if (
            ord(char) < 32 or ord(char) == 127 or char in "\u0085\u2028\u2029"
        ) and char not in allowed:
            return f"contains the control character {char!r}"
        if 0xD800 <= ord(char) <= 0xDFFF:
            return f"contains half of a surrogate pair ({char!r}), which is not text"
    return ""
