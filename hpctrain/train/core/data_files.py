"""Data files of the trainers that read text: jsonl, json, parquet, arrow and folders of them, row
by row, each with its place."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from hpctrain.base.errors import EnvironmentFault, Problem, UsageError, need
from hpctrain.base.files import read_json

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".arrow")
MAX_SHOWN = 20
Parsed = TypeVar("Parsed")


def find_files(path: str, split: str, unnamed: str = "train") -> list[str]:
    """The data files that `path` stands for, in order; `unnamed`: the split of files whose names
    tell none. Raises UsageError when there are none, or no such split."""
    if os.path.isfile(path):
        return [path]
    splits = os.path.join(path, "dataset_dict.json")
    if os.path.isfile(splits):
        known = (read_json(splits) or {}).get("splits", [])
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
            for entry in (read_json(state) or {}).get("_data_files", [])
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


def parsed_rows(
    files: Iterable[str], parse: Callable[[Any, str], Parsed], limit: int | None = None
) -> Iterator[Parsed]:
    """What `parse` makes of each row and its place, of the first `limit` rows.

    After the last one raises UsageError, with the places of the rows (the first 20 of them) for
    which `parse` raised ValueError; EnvironmentFault for files that cannot be read.
    """
    problems: list[Problem] = []
    seen = bad = 0
    for file in files:
        try:
            for where, row in data_rows(file):
                if seen == limit:
                    break
                seen += 1
                try:
                    yield parse(row, where)
                except ValueError as error:
                    bad += 1
                    if bad <= MAX_SHOWN:
                        problems.append(Problem(str(error), where=where))
        except OSError as error:
            words = f"cannot read it: {error.strerror or error}"
            raise EnvironmentFault(words, where=file) from error
    if bad > MAX_SHOWN:
        problems.append(Problem(f"{bad - MAX_SHOWN} more bad rows"))
    if problems:
        raise UsageError(problems)


def data_rows(file: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row of a file, whatever its format; a line that is no JSON gives
    None."""
    return _table_rows(file) if file.endswith((".parquet", ".arrow")) else _json_rows(file)


def _json_rows(file: str) -> Iterator[tuple[str, Any]]:
    with open(file, "rb") as stream:
        is_list = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        stream.seek(0)
        if is_list:
            try:
                rows = json.loads(stream.read())
            except ValueError as error:
                raise UsageError(f"not valid JSON: {error}", where=file) from error
            yield from ((f"{file}: record {number}", row) for number, row in enumerate(rows, 1))
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None  # said with the others
                yield f"{file}:{number}", row


def _table_rows(file: str) -> Iterator[tuple[str, Any]]:
    pyarrow = need("pyarrow", "train")
    batches = _parquet_batches(file) if file.endswith(".parquet") else _arrow_batches(file)
    number = 0
    try:
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{file}: row {number}", row
    except pyarrow.ArrowInvalid as error:
        kind = "a parquet" if file.endswith(".parquet") else "an arrow"
        raise UsageError(f"not {kind} file: {error}", where=file) from error


def _parquet_batches(file: str) -> Iterator[Any]:
    with need("pyarrow.parquet", "train").ParquetFile(file) as table:
        yield from table.iter_batches(1024)


def _arrow_batches(file: str) -> Iterator[Any]:
    """Record batches of either form, the stream's (as `datasets` writes it) or the file's."""
    pyarrow = need("pyarrow", "train")
    with pyarrow.memory_map(file) as source:
        try:
            batches = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        yield from batches
