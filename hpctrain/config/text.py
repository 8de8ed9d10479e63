"""Values as YAML text for people, with comments between; `document` reads back exactly what was
written."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from hpctrain.base.text import text_problem
from hpctrain.config.document import parse_yaml

_WIDTH = 118


def comment(text: str, indent: int = 0) -> list[str]:
    """`text` as comment lines; whatever it holds, it cannot end the comment."""
    prefix = " " * indent + "# "
    line = "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))
    return textwrap.wrap(line, _WIDTH, initial_indent=prefix, subsequent_indent=prefix)


def block(key: str, value: Any, indent: int = 0) -> list[str]:
    """`key: value` as lines of block YAML, lists in one line."""
    return [" " * indent + line for line in _block(key, value)]


def flow(value: Any) -> str:
    """`value` in one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(flow, value))}]"
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{scalar(str(key))}: {flow(item)}" for key, item in value.items())
            + "}"
        )
    return scalar(value)


def scalar(value: Any) -> str:
    """A YAML scalar: plain where that is safe, else quoted. Raises ValueError for text that YAML
    cannot hold."""
    if isinstance(value, float):
        # YAML 1.1 takes a number in scientific notation for text unless it has a dot.
        text = repr(value).replace("inf", ".inf").replace("nan", ".nan")
        return text if "." in text else text.replace("e", ".0e")
    if not isinstance(value, str):
        return json.dumps(value)
    if text_problem(value, multiline=True):
        raise ValueError(f"{value[:60]!r} {text_problem(value, multiline=True)}")
    if (
        re.fullmatch(r"[A-Za-z_./~][A-Za-z0-9_./~+-]*", value)
        and parse_yaml(value, "").data == value
    ):
        return value
    return json.dumps(value, ensure_ascii=False)


def _block(key: str, value: Any) -> Iterator[str]:
    name = scalar(str(key))
    if isinstance(value, dict) and value:
        yield f"{name}:"
        for sub, item in value.items():
            yield from ("  " + line for line in _block(str(sub), item))
    else:
        yield f"{name}: {flow(value)}"
