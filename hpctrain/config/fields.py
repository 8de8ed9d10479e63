"""Fields declared once: checked with positions and did-you-mean, and turned into JSON Schema for
editors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from hpctrain.base import units
from hpctrain.base.errors import Problem, printable
from hpctrain.base.text import text_problem
from hpctrain.config.document import Document, Path, looks_like_float

MAX_PATH_BYTES = 4095  # PATH_MAX of Linux (include/uapi/linux/limits.h), without its final NUL
MAX_INTEGER = 2**63  # more is counted by nobody, Slurm and torch least of all
_JSON_TYPES = {
    "text": "string",
    "path": "string",
    "time": ["string", "integer"],
    "memory": ["string", "number"],
    "int": "integer",
    "number": "number",
    "bool": "boolean",
    "scalar": ["string", "number", "boolean"],
}
_TYPE_NAMES = {
    "text": "text",
    "path": "a path",
    "int": "a whole number",
    "number": "a number",
    "bool": "true or false",
    "list": "a list",
    "map": "a mapping",
    "table": "a mapping",
    "scalar": "a plain value",
}


class Field:
    """One declared field.

    `kind`: text, path, int, number, bool, time (checked value: seconds), memory (GiB), scalar, any,
    list (of `items`), map (free keys matching `keys`, values `items`), table (the fields in
    `fields`). `pattern` must match the whole text and is explained by `shape`. `multiline` allows
    newlines and tabs. A `switch` is a table that may also be written `true` (all its defaults) or
    `false` (None, as when it is absent).
    """

    __slots__ = (
        "choices",
        "default",
        "doc",
        "fields",
        "items",
        "keys",
        "kind",
        "maximum",
        "minimum",
        "multiline",
        "nullable",
        "pattern",
        "required",
        "shape",
        "switch",
    )

    def __init__(
        self,
        kind: str,
        doc: str,
        *,
        required: bool = False,
        default: Any = None,
        choices: tuple[str, ...] = (),
        pattern: str = "",
        shape: str = "",
        minimum: float | None = None,
        maximum: float | None = None,
        items: Field | None = None,
        fields: Mapping[str, Field] | None = None,
        keys: str = "",
        multiline: bool = False,
        nullable: bool = False,
        switch: bool = False,
    ) -> None:
        self.kind, self.doc, self.required, self.default = kind, doc, required, default
        self.choices, self.pattern, self.shape = choices, pattern, shape
        self.minimum, self.maximum, self.items, self.fields, self.keys = (
            minimum,
            maximum,
            items,
            fields,
            keys,
        )
        self.multiline, self.nullable, self.switch = multiline, nullable, switch


def check(
    document: Document, fields: Mapping[str, Field], path: Path = ()
) -> tuple[dict[str, Any], list[Problem]]:
    """The checked values of a mapping at `path` (absent ones get their default), and every problem
    found."""
    problems: list[Problem] = []
    values = _table(document, document.get(*path, default={}), fields, path, problems)
    return values, problems


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint naming the nearest known word and, when there are few, all of them."""
    import difflib  # only needed for a mistake

    options = list(known)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    listing = f"known: {', '.join(options)}" if len(options) <= 25 else ""
    if near:
        return f"did you mean `{near[0]}`?" + (f" ({listing})" if listing else "")
    return listing


def countable(value: int | float) -> bool:
    """Whether one can calculate with a number: neither NaN nor infinite, and no integer of more
    than 64 bits."""
    return abs(value) < MAX_INTEGER if isinstance(value, int) else math.isfinite(value)


def json_schema(fields: Mapping[str, Field], title: str, description: str = "") -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a mapping with these fields."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title}
    if description:
        schema["description"] = description
    return {**schema, **_table_schema(fields)}


def _table(
    document: Document, node: Any, fields: Mapping[str, Field], path: Path, problems: list[Problem]
) -> dict[str, Any]:
    if not isinstance(node, dict):
        problems.append(_wrong_type(document, node, path, "a mapping"))
        return {}
    for key in node:
        if key not in fields:
            problems.append(
                Problem(
                    f"unknown key `{_dotted((*path, key))}`",
                    where=document.where_key(*path, key),
                    hint=nearest(str(key), fields),
                )
            )
    values: dict[str, Any] = {}
    for key, field in fields.items():
        if key in node and not (node[key] is None and not field.required):
            values[key] = _value(document, node[key], field, (*path, key), problems)
        elif field.required:
            problems.append(
                Problem(
                    f"`{_dotted((*path, key))}` is missing",
                    where=document.where(*path),
                    why=field.doc,
                )
            )
            values[key] = field.default
        else:
            values[key] = _default(field)
    return values


def _default(field: Field) -> Any:
    if field.default is not None or field.nullable:
        return field.default
    if field.switch:
        return None
    if field.kind == "table" and field.fields:
        return {key: _default(sub) for key, sub in field.fields.items()}
    return {"list": [], "map": {}, "table": {}}.get(field.kind)


def _value(
    document: Document, value: Any, field: Field, path: Path, problems: list[Problem]
) -> Any:
    count = len(problems)
    out = _typed(document, value, field, path, problems)
    if len(problems) > count or out is None:
        return out
    if isinstance(out, str):
        bad = text_problem(out, field.multiline)
        if not bad and field.kind == "path" and len(out.encode()) > MAX_PATH_BYTES:
            bad = f"is longer than {MAX_PATH_BYTES} bytes, the longest path there is"
        if bad:
            problems.append(Problem(f"`{_dotted(path)}` {bad}", where=document.where(*path)))
            # what is found with it further on is worth telling; the text itself is not
            return printable(out)[:100]
        what, why, hint = _text_fault(out, field)
        instead: Any = out
    elif isinstance(out, (int, float)) and not isinstance(out, bool):
        what, why, hint = _number_fault(out, field), "", ""
        # what follows from a number that cannot be is not worth a second error
        instead = field.default if field.default is not None else out
        if not countable(out) and field.default is None:
            instead = field.minimum or 0
    else:
        return out
    if not what:
        return out
    said = f"`{_dotted(path)}: {_written(document, value, path)}` {what}"
    problems.append(Problem(said, document.where(*path), why, hint))
    return instead


def _text_fault(text: str, field: Field) -> tuple[str, str, str]:
    """(what is wrong with a text, why, a hint); empty where it may stand."""
    if not text and field.required:
        return "is empty", "", ""
    if field.choices and text not in field.choices:
        return "is not one of them", "", nearest(text, field.choices)
    if field.pattern and not re.fullmatch(field.pattern, text, re.ASCII):
        return f"is not {field.shape}", f"allowed: {field.pattern}", ""
    return "", "", ""


def _number_fault(number: int | float, field: Field) -> str:
    if field.kind in ("int", "number") and not countable(number):
        return "is too large a number" if isinstance(number, int) else "is no finite number"
    if field.minimum is not None and number < field.minimum:
        return f"is less than {field.minimum:g}"
    if field.maximum is not None and number > field.maximum:
        return f"is more than {field.maximum:g}"
    return ""


def _typed(
    document: Document, value: Any, field: Field, path: Path, problems: list[Problem]
) -> Any:
    kind = field.kind
    if kind == "any":
        return value
    if kind == "table" and field.switch and not isinstance(value, dict):
        if not isinstance(value, bool):
            problems.append(_wrong_type(document, value, path, "true, false or a mapping"))
        values = {key: _default(sub) for key, sub in (field.fields or {}).items()}
        return values if value is True else None
    if kind == "table":
        return _table(document, value, field.fields or {}, path, problems)
    if kind == "list":
        return _list(document, value, field, path, problems)
    if kind == "map":
        return _map(document, value, field, path, problems)
    if kind in ("time", "memory"):
        return _amount(document, value, kind, path, problems)
    good = {
        "text": isinstance(value, str),
        "path": isinstance(value, str) and value != "",
        "int": isinstance(value, int) and not isinstance(value, bool),
        "number": isinstance(value, (int, float)) and not isinstance(value, bool),
        "bool": isinstance(value, bool),
        "scalar": isinstance(value, (str, int, float, bool)),
    }[kind]
    if good:
        return value
    hint = _type_hint(document, value, kind, path)
    problems.append(_wrong_type(document, value, path, _TYPE_NAMES[kind], hint))
    return field.default


def _type_hint(document: Document, value: Any, kind: str, path: Path) -> str:
    """How to write what is there so that YAML reads it as a value of `kind`."""
    if kind in ("text", "path") and isinstance(value, (int, float, bool)):
        return f'quote it: "{_written(document, value, path)}"'
    if kind in ("int", "number") and looks_like_float(value):
        return f"YAML reads `{value}` as text; write {_with_dot(value)}"
    if kind in ("int", "number") and isinstance(value, str) and re.fullmatch(r"[-+]?\d+", value):
        return "write it without quotes"
    return ""


def _amount(
    document: Document, value: Any, kind: str, path: Path, problems: list[Problem]
) -> int | float | None:
    """A duration in seconds, or memory in GiB."""
    try:
        if value is None:
            raise ValueError("it is empty")
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            wanted = "a duration" if kind == "time" else "an amount of memory"
            raise ValueError(f"`{_short(value)}` is not {wanted}")
        parse = units.parse_time_s if kind == "time" else units.parse_mem_gib
        return parse(value)
    except ValueError as error:
        problems.append(Problem(f"`{_dotted(path)}`: {error}", where=document.where(*path)))
        return None


def _list(
    document: Document, value: Any, field: Field, path: Path, problems: list[Problem]
) -> list[Any]:
    if not isinstance(value, list):
        hint = "write [a, b], or one `- item` a line"
        problems.append(_wrong_type(document, value, path, "a list", hint=hint))
        return []
    assert field.items
    return [
        _value(document, item, field.items, (*path, index), problems)
        for index, item in enumerate(value)
    ]


def _map(
    document: Document, value: Any, field: Field, path: Path, problems: list[Problem]
) -> dict[Any, Any]:
    if not isinstance(value, dict):
        problems.append(_wrong_type(document, value, path, "a mapping"))
        return {}
    assert field.items
    out = {}
    for key, item in value.items():
        if field.keys and not re.fullmatch(field.keys, str(key), re.ASCII):
            problems.append(
                Problem(
                    f"`{_short(key)}` is not a valid name in `{_dotted(path)}`",
                    where=document.where_key(*path, key),
                    why=f"allowed: {field.keys}",
                )
            )
            continue
        out[key if field.items.kind == "any" else str(key)] = _value(
            document, item, field.items, (*path, key), problems
        )
    return out


def _wrong_type(document: Document, value: Any, path: Path, wanted: str, hint: str = "") -> Problem:
    what = (
        f"`{_dotted(path)}: {_written(document, value, path)}` must be"
        if value is not None
        else f"`{_dotted(path)}` is empty, and must be"
    )
    return Problem(f"{what} {wanted}", where=document.where(*path), hint=hint)


def _written(document: Document, value: Any, path: Path) -> str:
    """The value as the file has it: `yes` rather than True."""
    origin = document.origins.get(path)
    plain = isinstance(value, (bool, int, float)) and origin and origin.written
    return _short(plain or value)


def _with_dot(text: str) -> str:
    head, _, exponent = text.lower().partition("e")
    return f"{head}.0e{exponent}"


def _dotted(path: Path) -> str:
    # The value is shown to people and must not bring control characters of its own.
    return printable(".".join(map(str, path))) or "the file"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return printable(text if len(text) <= 60 else text[:57] + "…")


def _table_schema(fields: Mapping[str, Field]) -> dict[str, Any]:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {key: _field_schema(field) for key, field in fields.items()},
        "additionalProperties": False,
    }
    required = [key for key, field in fields.items() if field.required]
    if required:
        schema["required"] = required
    return schema


def _field_schema(field: Field) -> dict[str, Any]:
    schema: dict[str, Any] = {"description": field.doc}
    if field.kind == "table":
        schema.update(_table_schema(field.fields or {}))
        if field.switch:
            schema["type"] = ["object", "boolean"]
    elif field.kind == "list":
        assert field.items
        schema.update(type="array", items=_field_schema(field.items))
    elif field.kind == "map":
        assert field.items
        schema.update(type="object", additionalProperties=_field_schema(field.items))
        if field.keys:
            schema["propertyNames"] = {"pattern": f"^(?:{field.keys})$"}
    elif field.kind != "any":
        schema["type"] = _JSON_TYPES[field.kind]
    _add_limits(schema, field)
    return schema


def _add_limits(schema: dict[str, Any], field: Field) -> None:
    """Which of the values of its type the field takes, and whether null."""
    if field.choices and field.kind == "any":
        # One of these words, or a mapping that whoever reads the field checks.
        schema["anyOf"] = [{"enum": [*field.choices, None]}, {"type": "object"}]
    elif field.choices:
        schema["enum"] = list(field.choices)
    if field.pattern and field.kind == "text":
        schema["pattern"] = f"^(?:{field.pattern})$"
    if field.minimum is not None and field.kind in ("int", "number"):
        schema["minimum"] = field.minimum
    if field.maximum is not None and field.kind in ("int", "number"):
        schema["maximum"] = field.maximum
    if not field.required and "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        schema["type"] = [*kinds, "null"]
        if field.choices:
            schema["enum"] = [*field.choices, None]
