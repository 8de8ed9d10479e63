"""Files of rows against what the trainer reads of them: columns, their kinds, how many rows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hpctrain.base.errors import Problem
from hpctrain.base.parquet import NoParquet, read_footer
from hpctrain.plan.look.reading import Reader
from hpctrain.recipes.facts import Rows

_HEAD_BYTES = 64 << 10
_MOST_ROWS = 20  # of the head of a file
_FOOTER_KINDS = {
    "text": ("text",),
    "messages": ("list",),
    "reply": ("text", "list"),
    "ids": ("list",),
}
_WORDS = {
    "text": "text",
    "messages": "a list of messages with `role` and `content`",
    "reply": "text or a list of messages",
    "ids": "a list of token ids",
}


def problems(data: Rows, reader: Reader) -> Iterator[Problem]:
    """Everything that the files contradict; files that are not here are told elsewhere."""
    total: int | None = 0
    where_files = ""
    for path, where in data.files:
        reader.turn_to(path)
        if not os.path.exists(path):
            return
        where_files = where_files or where
        files, wrong = _files_of(path, where, data, reader)
        yield from wrong
        for file in files:
            rows, wrong = _look_into(file, where, data, reader)
            yield from wrong
            total = None if rows is None or total is None else total + rows
            if wrong:
                break  # the other files of a folder were made by the same hand
    if data.stated is not None and total:
        yield from _count(data, total, where_files)
    yield from _template(data, reader)


def _count(data: Rows, total: int, where: str) -> Iterator[Problem]:
    if data.stated != total:
        yield Problem(
            f"the data has {total:,} rows, and the run says {data.stated:,}",
            data.where_stated or where,
            why="the number of steps follows from it, and with that when the run is done",
            hint=f"{total}",
        )


def _files_of(path: str, where: str, data: Rows, reader: Reader) -> tuple[list[str], list[Problem]]:
    """The files that a path stands for, of the first ending that is there."""
    if not os.path.isdir(path):
        return [path], []
    splits = reader.json(os.path.join(path, "dataset_dict.json"))
    if splits is not None and data.split is not None:
        known = [str(name) for name in splits.get("splits", [])]
        if data.split not in known:
            hint = f"one of {', '.join(known)}"
            what = f"`{path}` has no split `{data.split}`"
            return [], [Problem(what, data.where_split or where, hint=hint)]
        path = os.path.join(path, data.split)
    names = [
        os.path.join(folder, name)
        for folder in [path, *(os.path.join(path, inner) for inner in reader.names(path))]
        if os.path.isdir(folder)
        for name in reader.names(folder)
        if not name.startswith((".", "dataset_info", "dataset_dict", "state.json"))
    ]
    for ending in data.endings:
        files = [name for name in names if name.endswith(ending)]
        if files:
            return files[:100], []
    what = f"there is no file to read in `{path}`"
    return [], [Problem(what, where, hint=f"files may end in {', '.join(data.endings)}")]


def _look_into(
    file: str, where: str, data: Rows, reader: Reader
) -> tuple[int | None, list[Problem]]:
    """(rows where they are known, what is wrong) of one file."""
    reader.turn_to(file)
    try:
        if file.endswith(".parquet"):
            footer = read_footer(file)
            if footer is None:
                return None, [Problem(f"`{file}` cannot be looked into", where, level="note")]
            if not footer.rows:
                return 0, [Problem(f"`{file}` has no rows", where)]
            return footer.rows, _columns(file, where, footer.columns, data.shapes)
        if file.endswith((".jsonl", ".ndjson", ".json")):
            return _json(file, where, data.shapes, reader)
    except NoParquet as error:
        return None, [Problem(f"`{file}`: {error}", where)]
    except OSError as error:
        return None, [Problem(f"`{file}` cannot be read: {error.strerror}", where)]
    return None, []


def _columns(
    file: str, where: str, columns: Mapping[str, str], shapes: Sequence[Mapping[str, str]]
) -> list[Problem]:
    fits = [shape for shape in shapes if shape.keys() <= columns.keys()]
    if shapes and not fits:
        return [_no_shape(file, where, columns, shapes)]
    wrong = [
        Problem(
            f"column `{name}` of `{file}` is {columns[name]}, and the trainer reads {_WORDS[kind]}",
            where,
        )
        for shape in fits[:1]
        for name, kind in shape.items()
        if columns[name] not in _FOOTER_KINDS.get(kind, (columns[name],))
    ]
    return wrong


def _no_shape(
    place: str, where: str, columns: Mapping[str, Any], shapes: Sequence[Mapping[str, str]]
) -> Problem:
    has = ", ".join(f"`{name}`" for name in list(columns)[:12]) or "no column"
    return Problem(
        f"`{place}` has not the columns that the trainer reads",
        where,
        why=f"it has {has}",
        hint="needed: " + "; or ".join(", ".join(shape) for shape in shapes),
    )


def _json(
    file: str, where: str, shapes: Sequence[Mapping[str, str]], reader: Reader
) -> tuple[int | None, list[Problem]]:
    size = reader.size(file) or 0
    head = reader.read(file, 0, _HEAD_BYTES)
    if not head.strip():
        return 0, [Problem(f"`{file}` is empty", where)]
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return None, []  # one array; only the whole of it can be read
    lines = head.splitlines()
    if size > len(head):
        lines.pop()
    for number, line in enumerate(lines[:_MOST_ROWS], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig", "replace"))
        except (ValueError, RecursionError):
            return None, [Problem(f"`{file}:{number}` is no JSON object on one line", where)]
        if not isinstance(row, dict):
            return None, [Problem(f"`{file}:{number}` is no object with columns", where)]
        there = {name: value for name, value in row.items() if value is not None}
        fits = [shape for shape in shapes if shape.keys() <= there.keys()]
        if shapes and not fits:
            return None, [_no_shape(f"{file}:{number}", where, there, shapes)]
        if shapes and not any(_row_fits(row, shape) for shape in fits):
            name, kind = next(
                (name, kind) for name, kind in fits[0].items() if not _value_fits(row[name], kind)
            )
            what = f"`{name}` at `{file}:{number}` is not {_WORDS[kind]}"
            return None, [Problem(what, where)]
    count = sum(1 for line in lines if line.strip())
    return (count if size <= len(head) else None), []


def _row_fits(row: Mapping[str, Any], shape: Mapping[str, str]) -> bool:
    return all(_value_fits(row[name], kind) for name, kind in shape.items())


def _value_fits(value: Any, kind: str) -> bool:
    if kind == "text":
        return isinstance(value, str) and bool(value)
    if kind == "reply":
        return _value_fits(value, "text") or _value_fits(value, "messages")
    if kind == "ids":
        return isinstance(value, list) and all(type(token) is int for token in value)
    if kind == "messages":
        return (
            isinstance(value, list)
            and bool(value)
            and all(isinstance(turn, dict) and _spoken(turn) for turn in value)
        )
    return True


def _spoken(turn: Mapping[str, Any]) -> bool:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    return isinstance(role, str) and isinstance(content, str)


def _template(data: Rows, reader: Reader) -> Iterator[Problem]:
    """Dialogues need a chat template, and the tokenizers of base models bring none."""
    folder = data.template_of
    if not folder or not data.files or not _dialogue(data.files[0][0], reader):
        return
    about = reader.json(os.path.join(folder, "tokenizer_config.json"))
    apart = reader.size(os.path.join(folder, "chat_template.jinja")) is not None
    if about is not None and not about.get("chat_template") and not apart:
        yield Problem(
            f"the data are dialogues, and the tokenizer of `{folder}` has no chat template",
            data.files[0][1],
            why="base models have none; those tuned to follow instructions do",
            hint="put a chat_template.jinja beside its tokenizer, or give `prompt` and `completion`"
            " as text",
        )


def _dialogue(file: str, reader: Reader) -> bool:
    """Whether the first row of a file is messages."""
    try:
        if file.endswith(".parquet"):
            footer = read_footer(file)
            kinds = footer.columns if footer else {}
            return kinds.get("messages") == "list" or kinds.get("prompt") == "list"
        line = reader.read(file, 0, _HEAD_BYTES).split(b"\n", 1)[0]
        row = json.loads(line.decode("utf-8-sig", "replace"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and any(
        isinstance(row.get(name), list) for name in ("messages", "conversations", "prompt")
    )
