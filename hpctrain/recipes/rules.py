"""Rules that a framework has and a run may break, as tables: each with what is said where it is"
" broken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

from hpctrain.base.errors import Problem

if TYPE_CHECKING:
    from typing_extensions import TypeGuard

Key = Union[str, Sequence[Any]]


@dataclass(frozen=True)
class Rule:
    """One rule: whether it is `broken` (what is false or empty is not), and what is said then.
    `key` is what the run set, or the path to it, `where` its place where that is no key's."""

    broken: object
    what: str
    key: Key = ()
    why: str = ""
    hint: str = ""
    level: str = "error"
    where: str = ""


class Judge:
    """Collects the problems of a run while rules are held against it."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def place(self, key: Key) -> str:
        """`file:line:column` of what the run set: here a key is the place itself."""
        return str(key)

    def error(
        self,
        what: str,
        key: Key = (),
        why: str = "",
        hint: str = "",
        level: str = "error",
        where: str = "",
    ) -> None:
        """Note a problem at a key (or a path below one), or at `where`."""
        self.problems.append(Problem(what, where or self.place(key), why, hint, level))

    def check(self, *rules: Rule | tuple[Rule, ...]) -> None:
        """Note each rule that is broken; of a tuple only the first: those after it say no more."""
        for one in rules:
            group = (one,) if isinstance(one, Rule) else one
            broken = next((rule for rule in group if rule.broken), None)
            if broken:
                self.error(
                    broken.what, broken.key, broken.why, broken.hint, broken.level, broken.where
                )


def show(value: Any) -> str:
    """A value for a message: short, on one line."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return text if len(text) <= 60 else text[:57] + "…"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number, which YAML's true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
