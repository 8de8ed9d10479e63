"""Which text can be carried into scripts and files."""

from __future__ import annotations

import pytest

from hpctrain.base.text import MAX_TEXT, text_problem


@pytest.mark.parametrize("text", ["", "a b", "é漢🙂", "~" * MAX_TEXT, "\u00a0"])
def test_ordinary_text_is_no_problem(text):
    assert text_problem(text) == ""


@pytest.mark.parametrize("char", ["\0", "\x1f", "\n", "\t", "\x7f", "\u0085", "\u2028", "\u2029"])
def test_control_characters_are_named(char):
    assert text_problem(f"é{char}") == f"contains the control character {char!r}"
    assert bool(text_problem(f"a{char}", multiline=True)) == (char not in "\n\t")


@pytest.mark.parametrize("char", ["\ud800", "\udbff", "\udc00", "\udfff"])
def test_half_of_a_pair_is_no_text(char):
    assert "surrogate" in text_problem(char) and text_problem("\ud7ff\ue000") == ""


def test_a_text_has_a_greatest_length():
    assert text_problem("a" * (MAX_TEXT + 1)) == f"is longer than {MAX_TEXT} characters"
