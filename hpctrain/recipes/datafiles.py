"""Data that a trainer cannot read, told by the name of the file."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hpctrain.base.errors import Problem
from hpctrain.config.run import RunSpec

_ROWS = re.compile(r"\.(jsonl?|parquet|arrow|csv|tsv|txt|gz|zst)\Z", re.IGNORECASE)
_NO_ROWS = re.compile(
    r"\.(csv|tsv|txt|gz|bz2|xz|zst|zip|tar|bin|idx|npy|npz|pkl|pt|xlsx?)\Z", re.IGNORECASE
)


def indexed_problems(spec: RunSpec) -> Iterator[Problem]:
    """`data:` of a trainer that reads indexed datasets (PREFIX.bin and PREFIX.idx) names files of
    text."""
    for kind, paths in spec.data.items():
        for index, path in enumerate(paths):
            if _ROWS.search(path):
                yield Problem(
                    f"`{path}` is no indexed dataset",
                    spec.where("data", kind, index),
                    why="the trainer reads token ids, from a PREFIX.bin and a PREFIX.idx",
                    hint="`hpctrain tokenize` makes them from it; name the prefix, without .bin",
                )


def row_problems(path: str, where: str) -> Iterator[Problem]:
    """Data of a trainer that reads rows has a name that no such file has."""
    ending = _NO_ROWS.search(path)
    if ending:
        tokens = ending[1].lower() in ("bin", "idx")
        yield Problem(
            f"`{path}` is none of the files that are read",
            where,
            why=".jsonl, .json, .parquet or .arrow, or a folder of them",
            hint=(
                "name the rows that it was tokenized from"
                if tokens
                else "write it as .jsonl, one object a line"
            ),
        )
