"""The text: read by NeoX's loader with the same values and types, the same bytes every time, never
too long."""

import json
import math

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.recipes.neox.configs import MAX_TEXT_BYTES, config_text
from hpctrain.recipes.neox.keys import table

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=30) | st.sampled_from(
    [
        "8e-6",
        "1.0",
        "true",
        "null",
        "~",
        "2024-01-01",
        "20:00:00",
        "on",
        "",
        " x ",
        "a: b",
        "# x",
        "\n",
        "\x85",
        "\u2028",
        "é",
        "🚀",
        "0x1f",
        "%j",
        "{{ x }}",
    ]
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.booleans() | st.integers() | FLOATS | TEXTS | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def same(left, right):
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right and (
        not isinstance(left, float) or math.copysign(1, left) == math.copysign(1, right)
    )


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted(table("tilde"))) | st.just("own_key"), VALUES, max_size=8
    )
)
def test_neox_reads_back_the_same_values_and_types(values):
    text = config_text(values, table("tilde"), ["made by a test"])
    read = yaml.load(text, Loader=yaml.FullLoader) or {}  # noqa: S506

    assert all(same(values[key], read[key]) for key in values) and set(read) == set(values)
    assert config_text(dict(reversed(values.items())), table("tilde"), ["made by a test"]) == text


def test_exponents_have_a_dot_and_lists_one_line():
    text = config_text(
        {"min_lr": 8e-6, "attention_config": [[["flash"], 60]], "save": "/a b"}, table("tilde"), []
    )

    assert (
        "min_lr: 8.0e-06\n" in text
        and 'attention_config: [[["flash"], 60]]\n' in text
        and 'save: "/a b"\n' in text
    )


def test_a_config_too_long_for_an_argument_is_refused(neox):
    many = json.dumps([f"/scratch/{'x' * 150}/{index}" for index in range(300)])

    problem = neox(run={"data": f"{{train: {many}, valid: [/v], test: [/t]}}"}).problem(
        "can be handed to the ranks"
    )
    assert str(MAX_TEXT_BYTES) in problem.what and "data merge" in problem.hint


def test_rendering_is_deterministic(neox):
    assert neox().plan.resolved.configs == neox().plan.resolved.configs
