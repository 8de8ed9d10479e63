"""Declared fields: what is checked, where and how each problem is told, and what JSON Schema says
of them."""

from __future__ import annotations

import jsonschema
import pytest

from hpctrain.config.document import parse_yaml
from hpctrain.config.fields import MAX_INTEGER, Field, check, countable, json_schema, nearest


def checked(text, **fields):
    """(values, problems as `line:column what | why | hint`) of a YAML text."""
    values, problems = check(parse_yaml(text, "f.yaml"), fields)
    assert all(problem.where.startswith("f.yaml:") for problem in problems)
    return values, problems


def only(text, **fields):
    values, problems = checked(text, **fields)
    assert len(problems) == 1, problems
    return values, problems[0]


def test_good_values_come_through_and_absent_ones_are_their_defaults():
    fields = {
        "name": Field("text", "a name", required=True),
        "nodes": Field("int", "nodes", default=1, minimum=1),
        "lr": Field("number", "rate"),
        "flag": Field("bool", "whether"),
        "time": Field("time", "how long"),
        "mem": Field("memory", "memory"),
        "any": Field("any", "anything"),
        "plain": Field("scalar", "plain"),
        "list": Field("list", "items", items=Field("int", "one")),
        "map": Field("map", "pairs", items=Field("text", "one")),
        "table": Field(
            "table", "inner", fields={"a": Field("int", "a", default=5), "b": Field("text", "b")}
        ),
        "none": Field("list", "kept None", items=Field("int", "one"), nullable=True),
    }
    text = (
        "name: x\nlr: 1.5\nflag: true\ntime: 90\nmem: 2G\nany: [1]\nplain: 3\nlist: [1, 2]\nmap:"
        " {k: v}\ntable: {b: y}\n"
    )
    values, problems = checked(text, **fields)
    assert problems == []
    assert values == {
        "name": "x",
        "nodes": 1,
        "lr": 1.5,
        "flag": True,
        "time": 5400,
        "mem": 2.0,
        "any": [1],
        "plain": 3,
        "list": [1, 2],
        "map": {"k": "v"},
        "table": {"a": 5, "b": "y"},
        "none": None,
    }
    values, _ = checked("name: x\n", **fields)
    assert (values["list"], values["map"], values["table"], values["lr"]) == (
        [],
        {},
        {"a": 5, "b": None},
        None,
    )


@pytest.mark.parametrize(
    ("field", "text", "what", "hint"),
    [
        (Field("int", "d"), "k: '2'", "`k: 2` must be a whole number", "write it without quotes"),
        (Field("int", "d"), "k: true", "`k: true` must be a whole number", ""),
        (Field("int", "d"), "k: 1.5", "`k: 1.5` must be a whole number", ""),
        (
            Field("number", "d"),
            "k: 1e5",
            "`k: 1e5` must be a number",
            "YAML reads `1e5` as text; write 1.0e5",
        ),
        (Field("number", "d"), "k: abc", "`k: abc` must be a number", ""),
        (Field("number", "d"), "k: yes", "`k: yes` must be a number", ""),
        (Field("bool", "d"), "k: 1", "`k: 1` must be true or false", ""),
        (Field("text", "d"), "k: 5", "`k: 5` must be text", 'quote it: "5"'),
        (Field("text", "d"), "k: no", "`k: no` must be text", 'quote it: "no"'),
        (Field("text", "d"), "k: [a]", "`k: ['a']` must be text", ""),
        (Field("path", "d"), "k: ''", "`k: ` must be a path", ""),
        (
            Field("list", "d", items=Field("int", "d")),
            "k: a",
            "must be a list",
            "write [a, b], or one `- item` a line",
        ),
        (Field("map", "d", items=Field("int", "d")), "k: [1]", "must be a mapping", ""),
        (Field("table", "d", fields={}), "k: 3", "must be a mapping", ""),
        (Field("scalar", "d"), "k: [1]", "must be a plain value", ""),
        (Field("text", "d", required=True), "k:", "`k` is empty, and must be text", ""),
        (
            Field("table", "d", fields={}, switch=True),
            "k: 3",
            "must be true, false or a mapping",
            "",
        ),
        (Field("time", "d"), "k: soon", "`k`: ", ""),
        (Field("time", "d"), "k: true", "`k`: `True` is not a duration", ""),
        (Field("memory", "d"), "k: [1]", "`k`: `[1]` is not an amount of memory", ""),
    ],
)
def test_a_value_of_another_kind_is_told_with_what_was_written_and_what_helps(
    field, text, what, hint
):
    _, problem = only(f"# first line\n{text}\n", k=field)
    assert what in problem.what and problem.hint == hint
    assert problem.where.startswith("f.yaml:2:")


def test_a_wrong_value_becomes_the_default_so_that_nothing_follows_from_it():
    assert only("k: x\n", k=Field("int", "d", default=7))[0] == {"k": 7}
    assert only("k: 0\n", k=Field("int", "d", default=7, minimum=1))[0] == {"k": 7}
    assert only("k: 99\n", k=Field("int", "d", default=7, maximum=9))[0] == {"k": 7}
    assert only("k: .nan\n", k=Field("number", "d", minimum=2.5))[0] == {"k": 2.5}
    assert only(f"k: {MAX_INTEGER}\n", k=Field("int", "d"))[0] == {"k": 0}
    # Without a default there is nothing better than what was written.
    assert only("k: 0\n", k=Field("int", "d", minimum=1))[0] == {"k": 0}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("k: 1\n", "`k: 1` is less than 2"),
        ("k: 6\n", "`k: 6` is more than 5"),
        ("k: .inf\n", "is no finite number"),
        ("k: .nan\n", "is no finite number"),
        (f"k: {-MAX_INTEGER}\n", "is too large a number"),
    ],
)
def test_numbers_have_bounds(text, what):
    assert what in only(text, k=Field("number", "d", minimum=2, maximum=5))[1].what


@pytest.mark.parametrize("value", [2, 5, 3.5])
def test_the_bounds_themselves_are_allowed(value):
    assert checked(f"k: {value}\n", k=Field("number", "d", minimum=2, maximum=5)) == (
        {"k": value},
        [],
    )


def test_choices_patterns_and_empty_texts():
    values, problem = only("k: gren\n", k=Field("text", "d", choices=("green", "red")))
    assert (
        problem.what == "`k: gren` is not one of them" and "did you mean `green`?" in problem.hint
    )
    assert values == {"k": "gren"}
    _, problem = only("k: a b\n", k=Field("text", "d", pattern="[a-z]+", shape="a word"))
    assert (problem.what, problem.why) == ("`k: a b` is not a word", "allowed: [a-z]+")
    assert checked("k: ab\n", k=Field("text", "d", pattern="[a-z]+", shape="a word"))[1] == []
    assert (
        only("k: é\n", k=Field("text", "d", pattern=r"\w+", shape="a word"))[1].what
        == "`k: é` is not a word"
    )
    assert only("k: ''\n", k=Field("text", "d", required=True))[1].what == "`k: ` is empty"
    assert checked("k: ''\n", k=Field("text", "d"))[1] == []


def test_text_that_cannot_be_carried_is_told_and_does_not_go_on():
    values, problem = only('k: "a\\x07b"\n', k=Field("text", "d"))
    assert "control character" in problem.what and "\x07" not in values["k"]
    assert only('k: "a\\nb"\n', k=Field("text", "d"))[1].what.startswith("`k` contains")
    assert checked('k: "a\\nb"\n', k=Field("text", "d", multiline=True))[1] == []
    long = "é" * 2048
    assert "longer than 4095 bytes" in only(f"k: {long}\n", k=Field("path", "d"))[1].what
    assert checked(f"k: {long[:-1]}\n", k=Field("path", "d"))[1] == []
    assert checked(f"k: {long}\n", k=Field("text", "d"))[1] == []


def test_unknown_and_missing_keys_are_told_at_their_places():
    fields = {
        "nodes": Field("int", "how many"),
        "name": Field("text", "what it is called", required=True),
    }
    values, problems = checked("nodes: 2\n  \nnodse: 3\n", **fields)
    assert [(p.what, p.where) for p in problems] == [
        ("unknown key `nodse`", "f.yaml:3:1"),
        ("`name` is missing", "f.yaml:1:1"),
    ]
    assert "did you mean `nodes`?" in problems[0].hint and problems[1].why == "what it is called"
    assert values == {"nodes": 2, "name": None}


def test_inside_lists_maps_and_tables_the_whole_path_is_told():
    inner = Field("table", "d", fields={"n": Field("int", "d")})
    fields = {
        "list": Field("list", "d", items=inner),
        "map": Field("map", "d", items=Field("int", "d"), keys="[a-z]+"),
    }
    values, problems = checked(
        "list:\n- {n: 1}\n- {n: x, m: 2}\nmap: {a: b, B2: 3, c: 4}\n", **fields
    )
    assert sorted((p.what, p.where) for p in problems) == [
        ("`B2` is not a valid name in `map`", "f.yaml:4:13"),
        ("`list.1.n: x` must be a whole number", "f.yaml:3:7"),
        ("`map.a: b` must be a whole number", "f.yaml:4:10"),
        ("unknown key `list.1.m`", "f.yaml:3:10"),
    ]
    assert values["list"][0] == {"n": 1} and values["map"]["c"] == 4 and "B2" not in values["map"]


def test_the_keys_of_a_map_become_text_but_for_maps_of_anything():
    assert checked("k: {1: 2}\n", k=Field("map", "d", items=Field("int", "d")))[0] == {
        "k": {"1": 2}
    }
    assert checked("k: {1: 2}\n", k=Field("map", "d", items=Field("any", "d")))[0] == {"k": {1: 2}}


def test_a_switch_is_on_off_or_a_table():
    field = Field("table", "d", fields={"n": Field("int", "d", default=3)}, switch=True)
    cases = {"k: true": {"n": 3}, "k: false": None, "k: {n: 4}": {"n": 4}, "k:": None, "{}": None}
    for text, value in cases.items():
        assert checked(text + "\n", k=field) == ({"k": value}, [])


def test_a_file_that_is_no_mapping_is_one_problem():
    values, problem = only("- a\n", k=Field("int", "d"))
    assert "must be a mapping" in problem.what and values == {}


@pytest.mark.parametrize(
    ("value", "good"),
    [
        (MAX_INTEGER - 1, True),
        (MAX_INTEGER, False),
        (-MAX_INTEGER, False),
        (1e300, True),
        (float("inf"), False),
        (float("nan"), False),
    ],
)
def test_what_one_can_calculate_with(value, good):
    assert countable(value) == good


def test_the_nearest_word_is_named_and_a_short_list_is_shown():
    assert nearest("nodse", ["nodes", "name"]) == "did you mean `nodes`? (known: nodes, name)"
    assert nearest("zzz", ["nodes", "name"]) == "known: nodes, name"
    many = [f"word{number}" for number in range(26)]
    assert nearest("word1x", many) == "did you mean `word1`?" and nearest("zzz", many) == ""
    assert nearest("zzz", many[:25]).startswith("known: word0, ")


SCHEMA_FIELDS = {
    "name": Field("text", "a name", required=True, pattern="[a-z]+", shape="a word"),
    "kind": Field("text", "one of", choices=("a", "b")),
    "n": Field("int", "a number", minimum=1, maximum=9),
    "x": Field("number", "any"),
    "time": Field("time", "how long"),
    "list": Field("list", "items", items=Field("bool", "one")),
    "map": Field("map", "pairs", items=Field("scalar", "one"), keys="[a-z]+"),
    "table": Field("table", "inner", fields={"a": Field("path", "a", required=True)}),
    "switch": Field("table", "inner", fields={}, switch=True),
    "free": Field("any", "anything"),
}


@pytest.mark.parametrize(
    ("value", "good"),
    [
        ({"name": "x"}, True),
        ({}, False),
        ({"name": None}, False),
        ({"name": "X"}, False),
        ({"name": "x", "other": 1}, False),
        ({"name": "x", "kind": "a"}, True),
        ({"name": "x", "kind": None}, True),
        ({"name": "x", "kind": "c"}, False),
        ({"name": "x", "n": 1}, True),
        ({"name": "x", "n": 9}, True),
        ({"name": "x", "n": 0}, False),
        ({"name": "x", "n": 10}, False),
        ({"name": "x", "n": None}, True),
        ({"name": "x", "n": "1"}, False),
        ({"name": "x", "time": "1h"}, True),
        ({"name": "x", "time": 5}, True),
        ({"name": "x", "time": 1.5}, False),
        ({"name": "x", "list": [True, None]}, True),
        ({"name": "x", "list": [1]}, False),
        ({"name": "x", "map": {"a": 1}}, True),
        ({"name": "x", "map": {"A": 1}}, False),
        ({"name": "x", "map": {"a": []}}, False),
        ({"name": "x", "table": {"a": "p"}}, True),
        ({"name": "x", "table": {}}, False),
        ({"name": "x", "table": True}, False),
        ({"name": "x", "switch": True}, True),
        ({"name": "x", "switch": {}}, True),
        ({"name": "x", "switch": 1}, False),
        ({"name": "x", "free": [1, {"a": 2}]}, True),
    ],
)
def test_an_editors_schema_accepts_what_the_check_accepts(value, good):
    schema = json_schema(SCHEMA_FIELDS, "t", "d")
    assert (schema["title"], schema["description"]) == ("t", "d")
    jsonschema.Draft202012Validator.check_schema(schema)
    assert jsonschema.Draft202012Validator(schema).is_valid(value) == good


def test_a_schema_says_what_each_field_is_for():
    schema = json_schema(SCHEMA_FIELDS, "t")
    assert "description" not in schema and schema["properties"]["name"]["description"] == "a name"
    assert schema["required"] == ["name"] and "required" not in schema["properties"]["switch"]
