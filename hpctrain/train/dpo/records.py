"""Preference records from files: jsonl, json, parquet, arrow and folders of them, in one shape,
with their places.

Understood are the columns `prompt`, `chosen`, `rejected` as text or as lists of messages, replies
that begin with the same messages instead of a prompt, and `system`, `question`, `chosen`,
`rejected` (orca_dpo_pairs).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import EnvironmentFault, Problem, UsageError, missing_package

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".arrow")
MAX_SHOWN = 20
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Record:
    """One preference: all three are text, or all three are messages, `prompt` the part that both
    replies answer."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    where: str


def find_files(path: str, split: str, unnamed: str = "train") -> list[str]:
    """The data files that `path` stands for, in order; `unnamed`: the split of files whose names
    tell none. Raises UsageError when there are none, or no such split."""
    if os.path.isfile(path):
        return [path]
    splits = os.path.join(path, "dataset_dict.json")
    if os.path.isfile(splits):
        known = _json_file(splits).get("splits", [])
        if split not in known:
            raise UsageError(
                f"there is no split `{split}`",
                where=path,
                hint=f"set dataset.split to one of {', '.join(known)}",
            )
        path = os.path.join(path, split)
    state = os.path.join(path, "state.json")
    if os.path.isfile(state):  # as `Dataset.save_to_disk` writes it
        return [
            os.path.join(path, entry["filename"])
            for entry in _json_file(state).get("_data_files", [])
        ]
    found = [
        os.path.join(folder, name)
        for folder, below, names in sorted(os.walk(path))
        for name in sorted(names)
        if name.endswith(SUFFIXES) and not name.startswith((".", "dataset_info", "dataset_infos"))
    ]
    for suffix in SUFFIXES:  # one format only: the same rows often lie there in several
        files = [file for file in found if file.endswith(suffix)]
        if files:
            return _of_split(files, path, split, unnamed)
    raise UsageError(f"no data files in `{path}`", hint=f"files may end in {', '.join(SUFFIXES)}")


def _of_split(files: list[str], folder: str, split: str, unnamed: str) -> list[str]:
    """The files of one split, as `datasets` tells them apart (datasets/data_files.py): by the name
    before `-00000-of-00001`, else by the words of their paths below `folder`."""
    of: dict[str, list[str]] = {}
    for file in files:
        words = set(re.split(r"[\W_\d]+", os.path.relpath(file, folder).lower()))
        named = {name for name, known in _SPLITS.items() if known & words} | {split} & words
        sharded = re.match(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\b", os.path.basename(file))
        for name in {sharded[1]} if sharded else named or {unnamed}:
            of.setdefault(name, []).append(file)
    if split not in of:
        raise UsageError(
            f"there is no split `{split}`",
            where=folder,
            why="a file belongs to the split that its name tells",
            hint=f"there is {', '.join(sorted(of))}",
        )
    return of[split]


_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def read_records(files: list[str], limit: int | None = None) -> list[Record]:
    """The records of the files, at most `limit`.

    Raises UsageError with the place of every bad record (the first 20 of them), EnvironmentFault
    for unreadable files.
    """
    records: list[Record] = []
    problems: list[Problem] = []
    for file in files:
        try:
            for where, row in data_rows(file):
                if limit is not None and len(records) + len(problems) >= limit:
                    break
                try:
                    records.append(parse_record(row, where))
                except ValueError as error:
                    problems.append(Problem(str(error), where=where))
        except OSError as error:
            raise EnvironmentFault(
                f"cannot read it: {error.strerror or error}", where=file
            ) from error
    if problems:
        more = (
            [Problem(f"{len(problems) - MAX_SHOWN} more bad records")]
            if len(problems) > MAX_SHOWN
            else []
        )
        raise UsageError(problems[:MAX_SHOWN] + more)
    if not records:
        raise UsageError("no preference pairs in it", where=files[0] if files else "")
    return records


def parse_record(row: Any, where: str = "") -> Record:
    """A row in any of the shapes understood. Raises ValueError with what is wrong."""
    if not isinstance(row, dict):
        raise ValueError("is not an object with columns")
    lost = [name for name in ("chosen", "rejected") if row.get(name) in (None, "", [])]
    if lost:
        raise ValueError(f"`{'` and `'.join(lost)}` {'are' if lost[1:] else 'is'} missing or empty")
    chosen, rejected = _reply(row, "chosen"), _reply(row, "rejected")
    if type(chosen) is not type(rejected):
        raise ValueError("`chosen` and `rejected` must both be text, or both messages")
    if row.get("prompt") not in (None, ""):
        prompt = row["prompt"]
        prompt = prompt if isinstance(prompt, str) else _messages(prompt, "prompt")
    elif row.get("question") not in (None, ""):
        prompt = [{"role": "user", "content": _text(row, "question")}]
        if row.get("system"):
            prompt.insert(0, {"role": "system", "content": _text(row, "system")})
    elif isinstance(chosen, list) and isinstance(rejected, list):
        same = next(
            (n for n, (a, b) in enumerate(zip(chosen, rejected)) if a != b),
            min(len(chosen), len(rejected)),
        )
        same = min(same, len(chosen) - 1, len(rejected) - 1)
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        if not prompt:
            raise ValueError("there is no `prompt`, and the replies begin with different messages")
    else:
        raise ValueError("`prompt` (or `question`) is missing or empty")
    if isinstance(prompt, str) and isinstance(chosen, list):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and isinstance(chosen, str):
        chosen, rejected = (
            [{"role": "assistant", "content": str(text)}] for text in (chosen, rejected)
        )
    return Record(prompt, chosen, rejected, where)


def as_text(record: Record) -> Record:
    """A record of messages as plain text, for tokenizers without a chat template; roles are left
    out."""

    def joined(messages: str | Messages) -> str:
        return (
            messages
            if isinstance(messages, str)
            else "\n".join(message["content"] for message in messages)
        )

    prompt = joined(record.prompt)
    if isinstance(record.prompt, list):
        prompt += "\n"
    return Record(prompt, joined(record.chosen), joined(record.rejected), record.where)


def _reply(row: dict[str, Any], name: str) -> str | Messages:
    value = row[name]
    return value if isinstance(value, str) else _messages(value, name)


def _messages(value: Any, name: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{name}` is neither text nor a list of messages")
    out = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"`{name}` has a message without a `role`")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"`{name}` has a message whose `content` is not text")
        out.append({"role": message["role"], "content": message["content"]})
    return out


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"`{name}` is not text")
    return str(row[name])


def data_rows(file: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row of a file, whatever its format; a line that is no JSON gives
    None."""
    if file.endswith(".parquet"):
        yield from _parquet(file)
    elif file.endswith(".arrow"):
        yield from _arrow(file)
    else:
        yield from _json_lines(file)


def _json_lines(file: str) -> Iterator[tuple[str, Any]]:
    with open(file, "rb") as stream:
        if stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            stream.seek(0)
            try:
                yield from (
                    (f"{file}: record {n}", row)
                    for n, row in enumerate(json.loads(stream.read()), 1)
                )
            except ValueError as error:
                raise UsageError(f"not valid JSON: {error}", where=file) from error
            return
        stream.seek(0)
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None  # said with the others
            yield f"{file}:{number}", row


def _parquet(file: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_package("pyarrow", "train") from error
    try:
        with parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise UsageError(f"not a parquet file: {error}", where=file) from error


def _arrow(file: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
    except ImportError as error:
        raise missing_package("pyarrow", "train") from error
    try:
        with pyarrow.memory_map(file) as source:
            try:
                batches: Any = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
            number = 0
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise UsageError(f"not an arrow file: {error}", where=file) from error


def _json_file(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read it: {error}", where=path) from error
    return found if isinstance(found, dict) else {}
