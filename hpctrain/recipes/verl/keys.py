"""verl's own configuration keys, by version, to tell a slip of the pen from a key:
`templates/verl-gad/keys.txt`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from hpctrain.base.errors import Problem
from hpctrain.base.paths import shipped_text
from hpctrain.config.fields import nearest


@dataclass(frozen=True)
class Keys:
    """`versions` as listed; `known` maps a dotted key to the versions that have it."""

    versions: tuple[str, ...]
    known: dict[str, tuple[str, ...]]


@functools.lru_cache(maxsize=1)
def load_keys() -> Keys:
    """The shipped list."""
    versions: tuple[str, ...] = ()
    known: dict[str, tuple[str, ...]] = {}
    for line in shipped_text("verl-gad", "keys.txt").splitlines():
        words = line.split()
        if words[0] == "versions":
            versions = tuple(words[1:])
        elif words[0] != "#":
            known[words[1]] = tuple(
                version for version, mark in zip(versions, words[0]) if mark == "x"
            )
    return Keys(versions, known)


def key_problems(key: str, where: str) -> list[Problem]:
    """A warning for a key that no known verl has. `+key` adds one on purpose; the fork may have
    keys of its own."""
    if key.startswith(("+", "~")) or key.startswith("hydra."):
        return []
    keys = load_keys()
    parts = key.split(".")
    if any(".".join(parts[:count]) in keys.known for count in range(1, len(parts) + 1)):
        return []
    return [
        Problem(
            f"no verl from {keys.versions[0]} to {keys.versions[-1]} knows `config.{key}`",
            where,
            why="hydra refuses keys that the configuration does not have",
            hint="; ".join(
                filter(
                    None,
                    [
                        _nearest(key, keys),
                        f"`+{key}` adds a key; ignore this where GAD's verl has it",
                    ],
                )
            ),
            level="warning",
        )
    ]


def _nearest(key: str, keys: Keys) -> str:
    """The closest key by its whole name, else one with the same last part."""
    found = nearest(key, keys.known)
    if found:
        return found.split("? (")[0] + ("?" if "? (" in found else "")
    same = [known for known in keys.known if known.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return f"did you mean `{same[0]}`?" if same else ""
