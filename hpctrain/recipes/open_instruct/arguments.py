"""open-instruct's arguments: which a program has at which commit, of what type, and how a value
becomes flags.

The table is `templates/open-instruct/arguments.json`. finetune.py takes no YAML file (it calls
`parse_args_into_dataclasses`, not `parse`), so every value travels as a flag.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from hpctrain.base.errors import Problem
from hpctrain.base.paths import shipped_text
from hpctrain.base.text import text_problem
from hpctrain.config.document import Document
from hpctrain.config.fields import nearest
from hpctrain.recipes.rules import show


@dataclass(frozen=True)
class Argument:
    """One argument: `kind` as in arguments.json, `default` what the program takes without it."""

    name: str
    kind: str
    default: Any
    choices: tuple[str, ...]


def known_commits() -> Mapping[str, str]:
    """The commits whose arguments are known, oldest first: full hash -> day."""
    return dict(_data()["commits"])


def match_commit(commit: str) -> str | None:
    """The known commit that an (abbreviated) hash names, None when it is another one."""
    return next(
        (known for known in _data()["commits"] if commit and known.startswith(commit.lower())), None
    )


@cache
def table(program: str, commit: str | None) -> Mapping[str, Argument]:
    """The arguments of a program (its path in the working copy) at a known commit.

    For any other commit (None), and for a program of the user's own, every argument of any known
    commit of the program that is nearest by name; types are those of the newest.
    """
    programs = _data()["programs"]
    raw = programs.get(program) or programs[next(iter(programs))]
    found = {}
    for name, entry in raw.items():
        if commit and commit not in entry.get("only", [commit]):
            continue
        at = entry.get("at", {}).get(commit, entry)
        found[name] = Argument(name, at["kind"], at.get("default"), tuple(at.get("choices", ())))
    return found


def has_table(program: str) -> bool:
    return program in _data()["programs"]


def value_problems(argument: Argument, value: Any, document: Document) -> Iterator[Problem]:
    """What the program's own parser would refuse about a value, or would read as something else."""
    name, where = argument.name, document.where(argument.name)
    if value is None:
        return
    ok, hint = _fits(argument, value)
    if not ok:
        yield Problem(
            f"`{name}: {show(value)}` must be {_KINDS[argument.kind][0]}", where, hint=hint
        )
        return
    for index, word in enumerate(value if isinstance(value, list) else [value]):
        bad = text_problem(word, multiline=True) if isinstance(word, str) else ""
        if bad:
            yield Problem(
                f"`{name}` {bad}", document.where(name, index) if isinstance(value, list) else where
            )
        elif isinstance(word, float) and not math.isfinite(word):
            yield Problem(f"`{name}: {word}` is not a finite number", where)
    if argument.choices and value not in argument.choices:
        yield Problem(
            f"`{name}: {show(value)}` is not one of its values",
            where,
            hint=nearest(str(value), argument.choices),
        )


def describe_unknown(name: str, program: str, commit: str | None) -> tuple[str, str]:
    """(why, hint) for a key that the program does not have: it is another commit's, the other
    program's, or a slip."""
    if commit:
        for other, day in known_commits().items():
            if name in table(program, other):
                return (
                    f"{program} has it at {other[:7]} ({day}), and not at {commit[:7]}",
                    "delete it, or name that commit",
                )
    for other_program in _data()["programs"]:
        if other_program != program and name in table(other_program, commit):
            return f"{other_program} has it, {program} has not", nearest(
                name, table(program, commit)
            )
    hint = nearest(name, table(program, commit))
    own = "(arguments that only your own copy has go into `recipe_options.extra_arguments`)"
    return f"{program} stops at arguments that it does not know", f"{hint} {own}".lstrip()


def flags(values: Mapping[str, Any], arguments: Mapping[str, Argument]) -> list[list[str]]:
    """The words of a command line that give the program exactly `values`, one list a flag; null is
    left out.

    Numbers are written so that Python reads the same value back. A word that begins with a dash,
    which the program's parser would take for a flag, is joined to its flag by `=`.
    """
    words: list[list[str]] = []
    for name, value in values.items():
        if value is None:
            continue
        kind = arguments[name].kind if name in arguments else ""
        if isinstance(value, bool):
            words.append([f"--{name}", "true" if value else "false"])
        elif isinstance(value, dict) or kind == "json":
            words.append(
                [
                    f"--{name}",
                    value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
                ]
            )
        elif isinstance(value, list):
            # argparse takes words up to the next flag; an empty list cannot be said, and means the
            # default.
            words += [[f"--{name}", *map(word_of, value)]] if value else []
        elif _is_dashed(value):
            words.append([f"--{name}={value}"])
        else:
            words.append([f"--{name}", word_of(value)])
    return words


def word_of(value: Any) -> str:
    """A value as one word: 0.1 stays 0.1, 1.0 stays 1.0 (in a mixer list, 1 would mean one
    sample)."""
    return repr(value) if isinstance(value, float) else str(value)


def as_number(value: Any) -> float | None:
    """A number, also one that YAML 1.1 took for text (`8e-6`); None when it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, (str, int, float)) for word in value)


def _whole_or(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, *kinds)) and not isinstance(value, bool)


def _is_json(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, str) and value.startswith("{"))


# What a value of each kind is, and what is said to one that is not. Numbers are text too on a
# command line: `checkpointing_steps: 500`.
_KINDS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "text": ("text", _whole_or(str, float), ""),
    "bool": (
        "true or false",
        lambda value: isinstance(value, bool),
        "write true or false, without quotes",
    ),
    "int": ("a whole number", _whole_or(), ""),
    "number": ("a number", lambda value: as_number(value) is not None, ""),
    "list": ("a list of words", _is_words, "write it as [a, b]"),
    "json": ("a mapping", _is_json, "write it as {key: value}"),
    "int_or_text": ("a whole number or text", _whole_or(str), ""),
}


def _fits(argument: Argument, value: Any) -> tuple[bool, str]:
    _, fits, hint = _KINDS[argument.kind]
    ok = fits(value)
    dashed = ok and argument.kind == "list" and any(map(_is_dashed, value))
    return ok and not dashed, "its words cannot begin with a dash" if dashed else hint


def _is_dashed(word: object) -> bool:
    return isinstance(word, str) and word.startswith("-")


@cache
def _data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shipped_text("open-instruct", "arguments.json"))
    return found
