"""Reading records: strict, nothing repaired."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenize_help import A, U, model_path

from hpctrain.data.control import resolve
from hpctrain.data.markers import SPAN, Splitter
from hpctrain.data.records import Extractor, RecordForm, json_reader, read_line
from hpctrain.data.spm import load_model

FORM = RecordForm()


def add(record, form=FORM, tokens=()):
    control = resolve(load_model(model_path("bpe_identity")), tokens)
    layout, spans = [], []
    splitter = Splitter(control.ids())
    fault = Extractor(form, control, splitter).add(record, layout, spans)
    return fault and fault.kind, layout, spans


def parse(line):
    try:
        return json_reader()[0](line), None
    except (ValueError, RecursionError):
        return read_line(line)


@pytest.mark.parametrize(
    "record, kind",
    [
        ([], "json"),
        ("text", "json"),
        ({}, "text"),
        ({"text": None}, "text"),
        ({"text": 3}, "text"),
        ({"text": ["a"]}, "text"),
        ({"text": f"{U}\ud800{U}"}, "surrogate"),
        ({"messages": "x"}, "text"),
        ({"messages": [3]}, "text"),
        ({"messages": [{"role": "user"}]}, "text"),
        ({"messages": [{"role": 1, "content": "x"}]}, "text"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
        (
            {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]},
            "role",
        ),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "surrogate"),
    ],
)
def test_what_cannot_be_read_is_a_fault(record, kind):
    assert add(record) == (kind, [], [])


def test_messages_give_the_same_as_marked_up_text():
    chat = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b\n"}]
    }

    assert (
        add(chat)
        == add({"text": f"{U}a{U}{A} b\n{A}"})
        == (None, [7, SPAN, 7, 8, SPAN, 8], ["a", " b\n"])
    )


def test_gad_records_have_their_reply_beside_the_messages():
    record = {
        "content": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}],
        "teacher_response": "hello",
    }
    form = RecordForm(messages_key="content", response_key="teacher_response", system="prepend")

    assert add(record, form) == (None, [7, SPAN, 7, 8, SPAN, 8], ["Be kind.\n\nhi", "hello"])
    assert add({**record, "teacher_response": None}, form)[0] == "text"


def test_a_control_token_can_stand_for_system():
    tokens = ("<<<|user|>>>=<|user|>", "<<<|assistant|>>>=<|assistant|>", "<<<|system|>>>=<|r3|>")
    record = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}

    assert add(record, tokens=tokens) == (None, [3, SPAN, 3, 7, SPAN, 7], ["s", "u"])


@pytest.mark.parametrize(
    "line, kind, offset",
    [
        (b'{"text": "a"', "json", 12),
        (b'{"text": "\xff"}', "utf-8", 10),
        (b"\xff\xfe{\x00", "utf-8", 0),
        (b'\xef\xbb\xbf{"text": "a"}', "bom", 0),
        (b'{"text": "a\x00b"}', "nul", 11),
        (b'{"text": "a"} {}', "json", 14),
        (b"[" * 100_000, "json", 0),
        ('{"ā": x}'.encode(), "json", 7),
    ],
)
def test_bad_lines_say_where_in_bytes(line, kind, offset):
    record, fault = parse(line)

    assert record is None and (fault.kind, fault.offset) == (kind, offset)


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "x", "score": NaN}',
        b'{"score": -Infinity, "text": "x"}',
        b'{"a": "\\ud800", "text": "x"}',
    ],
)
def test_oddities_in_other_keys_do_not_matter(line):
    assert parse(line)[0]["text"] == "x"


def test_the_last_of_two_equal_keys_counts():
    assert parse(b'{"text": "a", "text": "b"}')[0] == {"text": "b"}
    assert parse(b'{"text": "a", "text": "b", "n": NaN}')[0]["text"] == "b"


# Hypothesis also tries the strings that it finds in our code, so that a marker itself may come up.
@given(
    st.text(st.characters(exclude_categories=[]), max_size=20).filter(
        lambda text: U not in text and A not in text
    )
)
def test_every_string_is_taken_verbatim_or_refused(text):
    record, fault = parse(json.dumps({"text": f"{U}x{text}{U}"}).encode())
    kind, _, spans = add(record) if not fault else (fault.kind, [], [])

    if any("\ud800" <= char <= "\udfff" for char in text):
        assert kind == "surrogate"
    elif kind is None:
        assert spans == [f"x{text}"]
    else:
        assert kind in ("nul", "unknown-marker")
