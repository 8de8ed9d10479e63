"""A NeoX configuration in the making: values with the layer and line they came from, decisions, and
all problems."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpctrain.base.errors import Problem
from hpctrain.config.decision import REPEATS, Decision
from hpctrain.config.document import Document, Origin, merge
from hpctrain.recipes import rules
from hpctrain.recipes.neox.keys import (
    Key,
    content_problems,
    describe_unknown,
    table,
    value_problems,
)
from hpctrain.recipes.rules import show

DEFAULT, BASE, RUN, RULE = "default", "base", "run", "rule"
_LAYER_REASON = {DEFAULT: "the recipe's default", BASE: REPEATS, RUN: "as the run says"}


@dataclass
class Draft(rules.Judge):
    """The configuration while the rules work on it.

    `values` by key; `layers` tells which layer set a key last (default, base, run, or rule for one
    of ours); `document` holds the merged layers, for positions; `broken` names the keys whose value
    was refused, so that no rule calls them missing too.
    """

    flavor: str
    keys: Mapping[str, Key]
    values: dict[str, Any]
    layers: dict[str, str]
    document: Document
    broken: set[str] = field(default_factory=set)
    decisions: dict[str, Decision] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def get(self, name: str) -> Any:
        """The value of a key, or what NeoX takes when it is not given."""
        value = self.values.get(name)
        return self.keys[name].default if value is None and name in self.keys else value

    def given(self, name: str) -> bool:
        """Whether somebody set the key to something other than null."""
        return self.values.get(name) is not None

    def missing(self, name: str) -> bool:
        """Whether nobody set the key, not even to a value that was refused."""
        return not self.given(name) and name not in self.broken

    def layer(self, name: str) -> str:
        """Which layer set the key last; empty when none did."""
        return self.layers.get(name, "")

    def where(self, name: str, *path: Any) -> str:
        """`file:line:column` of the key's value, or of what is nearest to it."""
        return self.document.where(name, *path)

    def number(self, name: str) -> int | None:
        """The value of a key when it is a whole number, else None (its type is reported
        elsewhere)."""
        value = self.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def put(self, name: str, value: Any, reason: str, origin: str = "") -> None:
        """Decide a value. What it replaces is named in the reason."""
        old = self.values.get(name)
        if old is not None and old != value:
            reason += f"; instead of {show(old)} at {self.where(name)}"
        self.values[name] = value
        self.layers[name] = RULE
        self.decisions[name] = Decision(
            f"config.{name}", value, reason, origin or "recipe neox-sft"
        )

    def drop(self, name: str, reason: str) -> None:
        """Leave a key out."""
        if name in self.values:
            old = self.values.pop(name)
            if old is not None:
                self.decisions[name] = Decision(
                    f"config.{name}",
                    None,
                    f"left out: {reason}; it was {show(old)}",
                    self.where(name),
                )
            self.layers.pop(name, None)

    def own(self, name: str, value: Any, reason: str, hint: str = "", same: bool = False) -> None:
        """Set a key that hpctrain decides: another value in run.yaml is an error, one in a base
        config is replaced.

        `same` says that the value in run.yaml means the same though it is written differently.
        """
        given = self.values.get(name)
        harmless = (
            same
            or given == value
            or (value is None and name in self.keys and given == self.keys[name].default)
        )
        if self.layer(name) == RUN and given is not None and not harmless:
            said = (
                f"contradicts what hpctrain sets: {show(value)}"
                if value is not None
                else "is not for a run to set"
            )
            self.error(
                f"`{name}: {show(given)}` {said}", name, why=reason, hint=hint or "delete it"
            )
            return
        if value is None:
            self.drop(name, reason)
        else:
            self.put(name, value, reason)

    def place(self, key: rules.Key) -> str:
        """`file:line:column` of a key's value, or of a path below one."""
        return self.where(key) if isinstance(key, str) else self.where(*key)

    def warn(
        self,
        what: str,
        name: str | Sequence[Any] = (),
        *,
        why: str = "",
        hint: str = "",
        where: str = "",
    ) -> None:
        """Like `error`, for what works but is probably not meant."""
        self.error(what, name, why=why, hint=hint, where=where, level="warning")

    def all_decisions(self) -> tuple[Decision, ...]:
        """Why each key is as it is, in the order of the configuration."""
        out = []
        for name in ordered(self.keys, [*self.values, *self.decisions]):
            layer = self.layer(name)
            if name in self.decisions:
                out.append(self.decisions[name])
            elif layer in _LAYER_REASON:
                out.append(
                    Decision(
                        f"config.{name}", self.values[name], _LAYER_REASON[layer], self.where(name)
                    )
                )
        return tuple(out)


def ordered(keys: Mapping[str, Key], names: Iterable[str]) -> list[str]:
    """Names in the table's order; those it does not know come last, by name."""
    rank = {name: index for index, name in enumerate(keys)}
    return sorted(set(names), key=lambda name: (rank.get(name, len(rank)), name))


def make_draft(
    flavor: str,
    defaults: Document,
    bases: Sequence[Document],
    run: Document,
    extra_keys: Sequence[str] = (),
) -> Draft:
    """The draft of recipe defaults < base configs < run.yaml, with every unknown key, wrong type
    and double key noted.

    Values of a wrong type are left out, so that the rules after this see only what NeoX would take.
    """
    keys = table(flavor)
    noted = rules.Judge()
    base_layers, first = _base_layers(bases, noted)
    run_layer, default_layer = _normalised(run, noted), _normalised(defaults, rules.Judge())
    document = merge([default_layer, *base_layers, run_layer])
    values = dict(document.data or {})
    layers = {name: DEFAULT for name in values}
    layers.update((name, BASE) for base in base_layers for name in base.data)
    layers.update((name, RUN) for name in run_layer.data or {})
    broken: set[str] = set()
    for name in list(values):
        if layers[name] == DEFAULT and name not in keys:
            del values[name]  # a default of the recipe that only the other flavor has
            continue
        bad = list(content_problems(name, values[name], document))
        if name not in keys and values[name] is None and name in first and layers[name] == RUN:
            del values[name]  # null in run.yaml takes a key of the base config out
            continue
        if name not in keys and name not in extra_keys:
            why, hint = describe_unknown(name, flavor)
            bad.append(
                Problem(
                    f"unknown key `{show(name)}`",
                    where=document.where_key(name),
                    why=why,
                    hint=hint,
                )
            )
        elif name in keys and not any(document.where(name) == problem.where for problem in bad):
            bad += value_problems(keys[name], values[name], document)
        if bad:
            noted.problems += bad
            broken.add(name)
            del values[name]
    draft = Draft(flavor, keys, values, layers, document, broken)
    draft.problems += noted.problems
    for name, layer_name in layers.items():
        if layer_name == RUN and name in first and name in values:
            draft.decisions[name] = Decision(
                f"config.{name}",
                values[name],
                f"as the run says, over the base config's at {first[name]}",
                document.where(name),
            )
    return draft


def _base_layers(
    bases: Sequence[Document], noted: rules.Judge
) -> tuple[list[Document], dict[str, str]]:
    """The base configs that are ones, and where each key is given first. Notes what is none, and
    what is given twice."""
    layers: list[Document] = []
    first: dict[str, str] = {}
    for base in bases:
        if not isinstance(base.data, dict) or not base.data:
            empty = "" if base.data else ", and this one is empty"
            what = f"a base config is a mapping of NeoX keys to values{empty}"
            noted.error(what, base.where(), why="NeoX stops at it too")
            continue
        layers.append(_normalised(base, noted))
        for name in layers[-1].data:
            where = layers[-1].where_key(name)
            noted.check(
                rules.Rule(
                    name in first,
                    f"`{name}` is in two base configs",
                    where,
                    why=f"first given at {first.get(name)}",
                    hint="delete one of them; base configs do not override each other, `config:`"
                    " in run.yaml overrides both",
                )
            )
            first.setdefault(name, where)
    return layers, first


def slashed(path: str) -> str:
    """A path without double or trailing slashes, to compare."""
    return os.path.normpath(path)


def _normalised(document: Document, noted: rules.Judge) -> Document:
    """The document with `-` in its keys as `_`, as NeoX reads them (arguments.py:251). Notes the
    keys that are no text, or twice there."""
    renamed: dict[Any, str] = {}
    data: dict[str, Any] = {}
    for key, value in (document.data or {}).items():
        name = str(key).replace("-", "_")
        if not isinstance(key, str):
            noted.error(f"the key `{key}` is not text", document.where_key(key))
        elif name in data:
            noted.error(
                f"key `{name}` is given twice, with `-` and with `_`",
                document.where_key(key),
                why="NeoX reads both as the same key and silently keeps the last",
                hint="delete one of them",
            )
        else:
            renamed[key] = name
            data[name] = value

    def moved(origins: Mapping[Any, Origin]) -> dict[Any, Origin]:
        return {
            (renamed[path[0]], *path[1:]) if path else path: origin
            for path, origin in origins.items()
            if not path or path[0] in renamed
        }

    return Document(data, moved(document.origins), moved(document.key_origins), document.name)
