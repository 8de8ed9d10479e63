"""Preference records: every shape and file format understood, and bad ones named by their place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from needed import needed

from hpctrain.base.errors import EnvironmentFault, UsageError
from hpctrain.train.core.data_files import find_files
from hpctrain.train.dpo.records import parse_record, read_records

USER, SYSTEM = {"role": "user", "content": "q"}, {"role": "system", "content": "s"}
GOOD, BAD = [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]
ROWS = [{"prompt": f"q{n}", "chosen": "a é\u2028", "rejected": "b"} for n in range(5)]


@pytest.mark.parametrize(
    "row,prompt,chosen",
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", "a"),
        ({"prompt": [USER], "chosen": GOOD, "rejected": BAD}, [USER], GOOD),
        ({"prompt": "q", "chosen": GOOD, "rejected": BAD}, [USER], GOOD),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, [USER], GOOD),
        ({"chosen": [SYSTEM, USER, *GOOD], "rejected": [SYSTEM, USER, *BAD]}, [SYSTEM, USER], GOOD),
        ({"chosen": [USER, *GOOD], "rejected": [USER, *GOOD]}, [USER], GOOD),
        ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, [SYSTEM, USER], GOOD),
        ({"system": "", "question": "q", "chosen": "a", "rejected": "b"}, [USER], GOOD),
    ],
)
def test_every_shape_is_understood(row: dict[str, Any], prompt: Any, chosen: Any) -> None:
    record = parse_record(row)

    assert (record.prompt, record.chosen) == (prompt, chosen)


@pytest.mark.parametrize(
    "row,words",
    [
        (None, "not an object"),
        ([], "not an object"),
        ({"prompt": "q"}, "`chosen` and `rejected` are missing"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "`rejected` is missing or empty"),
        ({"chosen": "a", "rejected": "b"}, "`prompt` (or `question`) is missing"),
        ({"prompt": "q", "chosen": "a", "rejected": BAD}, "both be text"),
        ({"prompt": "q", "chosen": 3, "rejected": 4}, "neither text nor"),
        ({"prompt": "q", "chosen": [{"role": "a"}], "rejected": BAD}, "not text"),
        ({"chosen": GOOD, "rejected": BAD}, "different messages"),
        ({"prompt": [3], "chosen": GOOD, "rejected": BAD}, "without a `role`"),
    ],
)
def test_every_other_row_is_refused_with_what_is_wrong(row: Any, words: str) -> None:
    with pytest.raises(ValueError, match="(?s)^" + ".*".join(map(_literal, [words]))):
        parse_record(row)


def _literal(text: str) -> str:
    import re

    return ".*" + re.escape(text)


def write(folder: Path, kind: str) -> Path:
    folder.mkdir()
    if kind == "jsonl":
        (folder / "x.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8"
        )
        return folder / "x.jsonl"
    if kind == "json":
        (folder / "x.json").write_text("\ufeff " + json.dumps(ROWS), encoding="utf-8")
        return folder / "x.json"
    pyarrow = needed("pyarrow")
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(ROWS)
    if kind == "parquet folder":
        (folder / "data").mkdir()
        parquet.write_table(table.slice(0, 2), folder / "data" / "train-00000.parquet")
        parquet.write_table(table.slice(2), folder / "data" / "train-00001.parquet")
        parquet.write_table(table, folder / "data" / "test-00000.parquet")
        (folder / "README.json").write_text("{}")
        return folder
    inside = folder / "train" if kind == "saved splits" else folder
    inside.mkdir(exist_ok=True)
    for name, part in (("data-0.arrow", table.slice(0, 3)), ("data-1.arrow", table.slice(3))):
        with (
            pyarrow.OSFile(str(inside / name), "wb") as sink,
            pyarrow.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(part)
    (inside / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": f"data-{n}.arrow"} for n in (0, 1)]})
    )
    if kind == "saved splits":
        (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet folder", "saved", "saved splits"])
def test_every_file_format_gives_the_same_records(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "it's $(touch canary) é", kind)

    records = read_records(find_files(str(path), "train"))

    assert [(record.prompt, record.chosen, record.rejected) for record in records] == [
        tuple(row.values()) for row in ROWS
    ]
    assert len(read_records(find_files(str(path), "train"), limit=3)) == 3


def test_bad_records_are_named_by_line_all_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n\n{"prompt"\n\xff\n' + b"{}\n" * 30
    )

    with pytest.raises(UsageError) as caught:
        read_records([str(path)])

    assert [problem.where.rpartition(":")[2] for problem in caught.value.problems[:3]] == [
        "3",
        "4",
        "5",
    ]
    assert caught.value.problems[-1].what == "12 more bad rows"


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.jsonl", "x.json"])
def test_an_empty_or_cut_file_is_refused(tmp_path: Path, name: str) -> None:
    needed("pyarrow")
    for content in (b"", b"[", b"PAR1\x00\x00"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError):
            read_records([str(tmp_path / name)])


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault):
        read_records([str(tmp_path / "none.jsonl")])
    with pytest.raises(UsageError, match="no data files"):
        find_files(str(tmp_path), "train")
    write(tmp_path / "d", "saved splits")
    with pytest.raises(UsageError, match="no split `dev`"):
        find_files(str(tmp_path / "d"), "dev")


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (["a.jsonl", "b.jsonl"], "train", ["a.jsonl", "b.jsonl"]),
        (["latest_data.jsonl", "contest.jsonl"], "train", ["contest.jsonl", "latest_data.jsonl"]),
        (["train.jsonl", "test.jsonl"], "train", ["train.jsonl"]),
        (["x-train-00000-of-00002.jsonl", "x-test-00000-of-00001.jsonl"], "test", ["x-test-"]),
        (["data/validation/a.jsonl", "data/train/a.jsonl"], "validation", ["data/validation/"]),
        (["trainer_notes.jsonl", "dev.jsonl"], "train", ["trainer_notes.jsonl"]),
        (["train_prefs.jsonl", "test_prefs.jsonl"], "train", ["train_prefs.jsonl"]),
        (
            ["train_gen-00000-of-00001.jsonl", "train_sft-00000-of-00001.jsonl"],
            "train_sft",
            ["train_s"],
        ),
        (["human.jsonl", "synthetic.jsonl"], "human", ["human.jsonl"]),
    ],
)
def test_a_split_is_a_word_of_the_path_and_no_part_of_one(
    tmp_path: Path, names: list[str], split: str, found: list[str]
) -> None:
    top = tmp_path / "test of mine"  # words of the folder itself say nothing
    for name in names:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text("{}\n")
    files = [os.path.relpath(file, top) for file in find_files(str(top), split)]
    assert len(files) == len(found)
    assert all(file.startswith(want) for file, want in zip(sorted(files), found)), files


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["test.jsonl"], "train"),
        (["a.jsonl"], "test"),
        (["train.jsonl", "dev.jsonl"], "test"),
        (["train_gen-00000-of-00001.jsonl", "train_sft-00000-of-00001.jsonl"], "train"),
    ],
)
def test_a_split_that_is_not_there_is_never_another_one(
    tmp_path: Path, names: list[str], split: str
) -> None:
    for name in names:
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(UsageError, match=f"no split `{split}`"):
        find_files(str(tmp_path), split)
