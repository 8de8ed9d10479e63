"""Values as hydra's command line reads them back: `key=value` words whose value is exactly what
run.yaml says.

Grammar: hydra.cc/docs/advanced/override_grammar/basic (1.1 to 1.3). In a quoted string only the
quote is escaped, and backslashes just before a quote are doubled; OmegaConf then reads `${…}` as a
reference, wherever it stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# Bare words that hydra takes as text. A number-like or empty text, or one of null/true/false, must
# be quoted to stay text.
_BARE = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.\-]*", re.ASCII)
_KEYWORDS = re.compile(r"(?i)null|true|false|nan|inf")
_WORDS = {None: "null", True: "true", False: "false"}
_KEY = re.compile(r"(?:\+\+|\+|~)?[A-Za-z_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*", re.ASCII)


def override(key: str, value: Any) -> str:
    """One word of verl's command line. `~key` deletes and takes no value."""
    return key if key.startswith("~") else f"{key}={value_text(value)}"


def value_text(value: Any) -> str:
    """`value` (None, bool, number, text, list, mapping) in hydra's grammar. Raises ValueError for
    anything else."""
    if value is None or isinstance(value, bool):
        return _WORDS[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(value_text(item) for item in value) + "]"
    if isinstance(value, Mapping):
        wrong = next(
            (
                key
                for key in value
                if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(key), re.ASCII)
            ),
            None,
        )
        if wrong is not None:
            raise ValueError(f"`{wrong}` cannot be a key inside a value of hydra's")
        return "{" + ",".join(f"{key}:{value_text(item)}" for key, item in value.items()) + "}"
    raise ValueError(f"{type(value).__name__} cannot be a value of hydra's")


def flatten(
    tree: Mapping[Any, Any], prefix: str = ""
) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """(dotted key, path in the tree, value) of every leaf; keys may be dotted already. An empty
    mapping is a leaf."""
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            for dotted, path, leaf in flatten(value, name):
                yield dotted, (key, *path), leaf
        else:
            yield name, (key,), value


def key_problem(key: str) -> str:
    """Why a key cannot be one of hydra's, or an empty string."""
    return "" if _KEY.fullmatch(key) else "is not a dotted name"


def _text(value: str) -> str:
    if _BARE.fullmatch(value) and not _KEYWORDS.fullmatch(value):
        return value
    # `\${` keeps OmegaConf from looking a reference up; a backslash before it is doubled to stay
    # one.
    value = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    value = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", value)
    value = re.sub(r"(\\+)\Z", lambda found: found[1] * 2, value)
    return f"'{value}'"
