"""NeoX's configuration keys in both flavors: which exist where, and the type each value must
have."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from hpctrain.base.errors import Problem
from hpctrain.base.paths import shipped_text
from hpctrain.base.text import text_problem
from hpctrain.config.document import Document, walk
from hpctrain.config.fields import nearest
from hpctrain.recipes.rules import show

FLAVORS = ("tilde", "upstream")
FLAVOR_NAMES = {"tilde": "the Tilde fork", "upstream": "EleutherAI's GPT-NeoX"}
_TYPE_NAMES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "int|float": "a number",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
}


# PyYAML (YAML 1.1) takes a number with an exponent for one only with both a dot and a signed
# exponent.
_NUMBER_AS_TEXT = re.compile(r"([-+]?)(\d+)(\.\d*)?[eE]([-+]?)(\d+)\Z", re.ASCII)


@dataclass(frozen=True)
class Key:
    """One key: `kind` is what `type(value)` must be, `choice` for one of `choices`; `flavors` where
    it exists."""

    name: str
    kind: str
    default: Any
    choices: tuple[str, ...]
    group: str
    flavors: tuple[str, ...]


@cache
def table(flavor: str) -> Mapping[str, Key]:
    """Every key of one flavor, in the order in which configurations are written."""
    return {name: key for name, key in _all_keys(flavor).items() if flavor in key.flavors}


def describe_unknown(name: str, flavor: str) -> tuple[str, str]:
    """(why, hint) for a key that `flavor` does not have: the other flavor's, or the nearest one."""
    other = next(known for known in FLAVORS if known != flavor)
    if name in table(other):
        return (
            (
                f"it exists in {FLAVOR_NAMES[other]} only, and {FLAVOR_NAMES[flavor]} refuses keys"
                " that it does not know"
            ),
            (
                f"delete it, or set `recipe_options: {{flavor: {other}}}` if the code in `dir` is"
                f" {FLAVOR_NAMES[other]}"
            ),
        )
    hint = nearest(name, table(flavor))
    return (
        f"{FLAVOR_NAMES[flavor]} stops with a TypeError at keys that it does not know",
        f"{hint} (keys that only your own copy has go into `recipe_options.extra_keys`)".lstrip(),
    )


def value_problems(key: Key, value: Any, document: Document) -> Iterator[Problem]:
    """What NeoX's start-up check would refuse about a value, said properly; `document` has the key
    at its root.

    The rule is NeoX megatron/neox_arguments/arguments.py:1365-1422: exact `type(value)`, an int
    passes for a float, null always passes, choices are compared without case.
    """
    where = document.where(key.name)
    if value is None:
        return
    if key.kind == "choice":
        if not isinstance(value, str) or value.lower() not in [
            choice.lower() for choice in key.choices
        ]:
            yield Problem(
                f"`{key.name}: {show(value)}` is not one of its values",
                where=where,
                hint=nearest(str(value), key.choices) or f"known: {', '.join(key.choices)}",
            )
        return
    accepted = key.kind.split("|")
    kind = type(value).__name__
    if key.kind == "any" or kind in accepted or (kind == "int" and "float" in accepted):
        return
    hint = ""
    if number_as_text(value):
        hint = f"YAML reads `{value}` as text; write {with_dot(value)}"
    elif kind == "float" and accepted == ["int"] and float(value).is_integer():
        hint = f"write {int(value)}"
    elif (
        kind == "str"
        and re.fullmatch(r"[-+]?\d+", value)
        and ("int" in accepted or "float" in accepted)
    ):
        hint = "write it without quotes"
    elif kind in ("int", "float", "bool") and accepted == ["str"]:
        hint = f'quote it: "{value}"'
    elif accepted == ["list"] and isinstance(value, str):
        hint = f'write ["{value}"]'
    yield Problem(
        f"`{key.name}: {show(value)}` must be {_TYPE_NAMES[key.kind]}",
        where=where,
        why="NeoX compares exact types and stops at others with an unreadable error",
        hint=hint,
    )


def content_problems(name: str, value: Any, document: Document) -> Iterator[Problem]:
    """Values inside `value` that would not mean what was written: numbers read as text, control
    characters, NaN."""
    for path, inner in walk(value):
        dotted = ".".join(map(str, (name, *path)))
        where = document.where(name, *path)
        if isinstance(inner, dict):
            for bad in [key for key in inner if not isinstance(key, str)]:
                yield Problem(
                    f"`{dotted}` has the key `{bad}`, which is not text",
                    where=where,
                    hint=f'quote it: "{bad}"',
                )
        if isinstance(inner, str):
            bad = text_problem(inner, multiline=True)
            if bad:
                yield Problem(f"`{dotted}` {bad}", where=where)
            elif path and number_as_text(inner):
                yield Problem(
                    f"`{dotted}: {inner}` is text, not a number",
                    where=where,
                    why=(
                        "YAML 1.1, which NeoX reads, takes a number with an exponent for text"
                        " unless it has a dot and a signed exponent"
                    ),
                    hint=f"write {with_dot(inner)}",
                )
        elif isinstance(inner, float) and not math.isfinite(inner):
            yield Problem(f"`{dotted}: {inner}` is not a finite number", where=where)


def number_as_text(value: Any) -> bool:
    """Whether a text is a number whose exponent YAML 1.1 did not recognise: `8e-6`, `1.0e6`."""
    return isinstance(value, str) and bool(_NUMBER_AS_TEXT.match(value))


def with_dot(text: str) -> str:
    """`8e-6` as YAML 1.1 reads it for a number: `8.0e-6`."""
    match = _NUMBER_AS_TEXT.match(text)
    assert match
    sign, whole, fraction, exponent_sign, exponent = match.groups()
    fraction = fraction if fraction and len(fraction) > 1 else ".0"
    return f"{sign}{whole}{fraction}e{exponent_sign or '+'}{exponent}"


@cache
def _all_keys(flavor: str) -> Mapping[str, Key]:
    raw = json.loads(shipped_text("neox-sft", "keys.json"))["keys"]
    return {
        name: Key(
            name,
            entry["type"],
            entry.get("default"),
            tuple((flavor == "tilde" and entry.get("tilde_choices")) or entry.get("choices", ())),
            entry["group"],
            tuple(entry.get("flavors", FLAVORS)),
        )
        for name, entry in raw.items()
    }
