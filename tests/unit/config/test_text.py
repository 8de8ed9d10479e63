"""YAML for people: what is written reads back as the same value."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.config.document import parse_yaml
from hpctrain.config.text import block, comment, flow, scalar

TEXT = st.text(
    alphabet=st.characters(
        exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\ufeff\ufffe\uffff"
    ),
    max_size=30,
)
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False), TEXT
)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)
)


def read(lines):
    return parse_yaml("\n".join(lines) + "\n", "f").data


@given(st.dictionaries(TEXT, VALUES, max_size=4))
def test_any_value_reads_back(values):
    assert (
        read([line for key, value in values.items() for line in block(key, value)] or ["{}"])
        == values
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain/path.x", "plain/path.x"),
        ("", '""'),
        ("yes", '"yes"'),
        ("null", '"null"'),
        ("1e5", '"1e5"'),
        ("a: b", '"a: b"'),
        ("#x", '"#x"'),
        ("-x", '"-x"'),
        ("~", '"~"'),
        ("~/x", "~/x"),
        ("é", '"é"'),
        ("a\nb", '"a\\nb"'),
        (True, "true"),
        (None, "null"),
        (5, "5"),
        (0.5, "0.5"),
        (1e-05, "1.0e-05"),
        (5e-07, "5.0e-07"),
        (1.5e-07, "1.5e-07"),
        (math.inf, ".inf"),
        (-math.inf, "-.inf"),
    ],
)
def test_a_scalar_is_plain_where_that_is_safe(value, text):
    assert scalar(value) == text and parse_yaml(text, "f").data == value


def test_text_that_yaml_cannot_hold_is_refused():
    for text in ("a\x07b", "\ud800"):
        with pytest.raises(ValueError, match="contains"):
            scalar(text)


def test_lists_stand_in_one_line_and_tables_below_their_key():
    assert flow([1, "a b", [], {"k": "v"}]) == '[1, "a b", [], {k: v}]'
    assert block("t", {"a": {"b": 1}, "c": []}, 2) == ["  t:", "    a:", "      b: 1", "    c: []"]
    assert block("t", {}) == ["t: {}"] and block("on", 1) == ['"on": 1']


def test_a_comment_cannot_end_itself_and_is_wrapped():
    assert comment("a\nb\x07 c") == ["# a b? c"]
    lines = comment("word " * 60, 4)
    assert len(lines) == 3 and all(
        line.startswith("    # word") and len(line) <= 118 for line in lines
    )
    assert comment("") == []
