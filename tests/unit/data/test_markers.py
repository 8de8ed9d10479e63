"""The marker grammar against `re.split` as the reference uses it."""

import re
import sys

import pytest
import tokenize_help as help
from hypothesis import given
from hypothesis import strategies as st
from tokenize_help import A, U

from hpctrain.data.markers import ALLOWABLE, SPAN, Splitter

IDS = {U: 7, A: 8}
PARTS = st.lists(
    st.sampled_from(
        [
            U,
            A,
            "x",
            " ",
            "\n",
            "\u00a0",
            "<<<|",
            "|>>>",
            "<<<|x|>>>",
            "text <|user|>",
            "\u2028",
            "a\0b",
            "<",
        ]
    ),
    max_size=12,
).map("".join)


def split(text, allow=()):
    layout, spans = [], []
    splitter = Splitter(IDS, allow)
    fault = splitter.split(text, layout, spans)
    return fault, layout, spans, splitter.special


def expected(text):
    out, spans = [], []
    for part in re.split(f"({re.escape(U)}|{re.escape(A)})", text):
        if part in IDS:
            out.append(IDS[part])
        elif part.strip():
            out.append(SPAN)
            spans.append(part)
    return out, spans


@given(PARTS)
def test_with_everything_allowed_it_splits_as_the_reference(text):
    fault, layout, spans, _ = split(text, ALLOWABLE)
    want, want_spans = expected(text)

    assert fault is None
    assert (layout, spans) == (want, want_spans)


@given(PARTS)
def test_what_the_strict_grammar_accepts_is_what_the_reference_makes(text):
    fault, layout, spans, _ = split(text)

    if fault is None:
        assert (layout, spans) == expected(text)
        assert layout and len(layout) > 1
    else:
        assert (layout, spans) == ([], [])
        assert 0 <= fault.offset <= len(text)


@pytest.mark.parametrize(
    "text, kind, offset",
    [
        (f"{U}a{U}{A}b", "unbalanced", 13 + 12),
        (f"{U}a{A}b{A}{U}", "unbalanced", 13),
        (f"{U}a{U} x {A}b{A}", "outside-text", 25),
        (f"{U}a <<<|system|>>> b{U}", "unknown-marker", 14),
        (f"{U}a{U}<<<|oops|>>>", "outside-text", 25),
        (f"{U}a\0{U}", "nul", 13),
        ("plain text", "no-marker", 0),
        (U, "no-marker", 0),
        (f" {U} ", "no-marker", 0),
        ("   ", "no-marker", 0),
    ],
)
def test_faults_say_what_and_where(text, kind, offset):
    fault, _, _, _ = split(text)

    assert fault is not None and (fault.kind, fault.offset) == (kind, offset)


def test_blank_spans_vanish_and_are_counted():
    fault, layout, spans, special = split(f"{U} \n{U}\n{A}\u00a0x{A}")

    assert (fault, layout, spans) == (None, [7, 7, 8, SPAN, 8], ["\u00a0x"])
    assert special == {"empty turns": 1, "whitespace between turns": 1}


def test_isspace_is_strip_for_every_character():
    assert all(
        bool(chr(code).strip()) == (not chr(code).isspace()) for code in range(sys.maxunicode + 1)
    )


def test_markers_of_any_shape_and_number():
    splitter = Splitter({"[Q]": 3, "[A]": 4, "[S]": 5})
    layout, spans = [], []

    assert splitter.split("[S]be nice[S][Q]a.b*c[Q][A]<<<|user|>>x[A]", layout, spans) is None
    assert layout == [5, SPAN, 5, 3, SPAN, 3, 4, SPAN, 4]
    assert spans == ["be nice", "a.b*c", "<<<|user|>>x"]


def test_chat_messages_may_not_hold_markers():
    layout, spans = [], []
    fault = Splitter(IDS).chat([(7, "hello"), (8, f"x{U}y")], layout, spans)

    assert fault is not None and fault.kind == "marker" and (layout, spans) == ([], [])


def test_dialogues_of_the_other_tests_are_accepted():
    assert [text for text in help.dialogues(500) if split(text)[0]] == []
