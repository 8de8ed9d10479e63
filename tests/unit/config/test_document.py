import os

import pytest

from hpctrain.base.errors import UsageError
from hpctrain.config.document import load_yaml, looks_like_float, merge, parse_set, parse_yaml


def test_every_value_knows_its_line_and_column():
    document = parse_yaml("a: 1\nb:\n  c: [x, y]\n", "run.yaml")

    assert document.data == {"a": 1, "b": {"c": ["x", "y"]}}
    assert document.where("b", "c", 1) == "run.yaml:3:10"
    assert document.where_key("b", "c") == "run.yaml:3:3"


def test_all_duplicate_keys_are_reported_at_once_with_both_places():
    with pytest.raises(UsageError) as caught:
        parse_yaml("a: 1\nb: 2\na: 3\nb: 4\n", "run.yaml")

    assert [problem.where for problem in caught.value.problems] == ["run.yaml:3:1", "run.yaml:4:1"]
    assert "run.yaml:1:1" in caught.value.problems[0].why


def test_durations_and_dates_stay_text():
    assert parse_yaml("time: 20:00:00\nday: 2026-11-21\n", "f").data == {
        "time": "20:00:00",
        "day": "2026-11-21",
    }


def test_a_number_that_yaml_takes_for_text_is_noticed():
    assert looks_like_float(parse_yaml("lr: 8e-6", "f").data["lr"])
    assert not looks_like_float(parse_yaml("lr: 8.0e-6", "f").data["lr"])


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: !!python/object:os.system x",
        "\tb: 1",
        "a: &x [*x]",
        "? [a]\n: 1",
        "a: 'x",
        "%",
        "a: \x00",
    ],
)
def test_broken_yaml_is_one_clear_error(text):
    with pytest.raises(UsageError) as caught:
        parse_yaml(text, "run.yaml")

    assert caught.value.problems[0].where.startswith("run.yaml")


def test_not_utf8_names_the_line():
    with pytest.raises(UsageError) as caught:
        parse_yaml(b"a: 1\nb: \xff\n", "run.yaml")

    assert caught.value.problems[0].where == "run.yaml:2:1"


def test_layers_merge_key_by_key_and_keep_origins():
    base = parse_yaml("a: {x: 1, y: 2}\nl: [1, 2]\n", "base.yaml")
    top = parse_yaml("a: {y: 3}\nl: [9]\n", "top.yaml")
    merged = merge([base, top, parse_set(["a.z=8.0e-6"])])

    assert merged.data == {"a": {"x": 1, "y": 3, "z": 8e-6}, "l": [9]}
    assert merged.where("a", "x").startswith("base.yaml")
    assert merged.where("a", "y").startswith("top.yaml")
    assert merged.where("a", "z") == "--set a.z"
    assert merged.where("l", 0).startswith("top.yaml")


def test_anchors_and_merge_keys_work():
    assert parse_yaml("b: &b {x: 1, y: 2}\nc: {<<: *b, y: 5}\n", "f").data["c"] == {"x": 1, "y": 5}


@pytest.mark.parametrize("text", ["novalue", "=1", "a..b=1", "a=[", "a.b=1"])
def test_bad_set_options_are_refused(text):
    with pytest.raises(UsageError):
        parse_set(["a=1", text])


@pytest.mark.parametrize(
    ("text", "value"),
    [("007", 7), ("0", 0), ("1_000", 1000), ("0x10", 16), ("'010'", "010"), ("08", "08")],
)
def test_a_number_that_all_yaml_reads_alike_is_taken(text, value):
    assert parse_yaml(f"a: {text}\n", "f").data == {"a": value}


def test_a_leading_zero_that_would_change_the_number_is_refused():
    with pytest.raises(UsageError) as caught:
        parse_yaml("nodes: 010\nb: -0_20\n", "f")
    assert [(problem.where, problem.hint) for problem in caught.value.problems] == [
        ("f:1:8", "write 10, or quote it where text is meant"),
        ("f:2:4", "write -20, or quote it where text is meant"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a: {<<: 3}",
        "a: {<<: [x]}",
        "a: &m\n  <<: *m\n  [x]: 1",
        "a: {<<: {b: 1}, [x]: 2}",
        "a: {<<: , b: 1}",
    ],
)
def test_a_merge_key_that_merges_nothing_is_one_clear_error(text):
    with pytest.raises(UsageError) as caught:
        parse_yaml(text, "run.yaml")

    assert all(problem.where.startswith("run.yaml:") for problem in caught.value.problems)


def test_what_a_mapping_has_itself_wins_over_what_it_merges():
    text = "x: &x {a: 1, b: 2}\ny: {<<: [*x, {b: 5, c: 6}], b: 3}\n"
    assert parse_yaml(text, "f").data["y"] == {"a": 1, "b": 3, "c": 6}


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="not a plain file"):
        load_yaml(tmp_path / "fifo")
