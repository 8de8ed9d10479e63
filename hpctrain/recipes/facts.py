"""What a recipe knows of the things that its job will open: `check` opens those that lie here, and
compares. Pure declarations; `hpctrain/plan/look` reads.

`where` is always the place in run.yaml (or the base config) that names the thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Union


class Masks(NamedTuple):
    """NeoX's loss masks: token ids, and where each rule is set. `pairs` is flat: open, close, …"""

    pairs: tuple[int, ...] = ()
    alternating: tuple[int, ...] = ()
    individual: tuple[int, ...] = ()
    where_pairs: str = ""
    where_alternating: str = ""
    where_individual: str = ""


class Indexed(NamedTuple):
    """Indexed datasets (PREFIX.bin and PREFIX.idx) of one split.

    `prefixes`: (prefix, where). `window`: tokens of a row; `packed`: a row holds several documents;
    `skips`: a document that is longer is left out. `needs_eod`: why every document must end with an
    end-of-document token, empty where not. `tokenizer`: the SentencePiece model that the trainer
    reads. `rows`: how many rows of the window the run trains on. `config`: a config.json whose
    `vocab_size` must hold every id.
    """

    prefixes: tuple[tuple[str, str], ...]
    window: int | None = None
    where_window: str = ""
    packed: bool = True
    skips: bool = True
    masks: Masks | None = None
    needs_eod: str = ""
    tokenizer: str | None = None
    where_tokenizer: str = ""
    rows: int | None = None
    where_rows: str = ""
    config: str | None = None
    where_config: str = ""


class Rows(NamedTuple):
    """Files of rows, or a folder of them. A row has all columns of one of `shapes`: name -> kind
    (text, messages, reply: either of the two, ids, any).

    `stated`: rows that the run says there are; `split`: the part that is read.
    """

    files: tuple[tuple[str, str], ...]
    shapes: tuple[Mapping[str, str], ...]
    stated: int | None = None
    where_stated: str = ""
    split: str | None = None
    where_split: str = ""
    template_of: str | None = None  # a folder whose tokenizer must have a chat template
    endings: tuple[str, ...] = (".parquet", ".jsonl", ".ndjson", ".json", ".arrow")


class Model(NamedTuple):
    """A folder in Hugging Face form that the job loads.

    `families`: the values of `model_type` that the program takes, None for any; `instead`: what to
    do with another. `length`: the longest sequence of the run. `weights`: it must have them.
    """

    what: str
    path: str
    where: str
    families: tuple[str, ...] | None = None
    instead: str = ""
    length: int | None = None
    where_length: str = ""
    weights: bool = True
    tokenizer: bool = True
    full_precision: bool = False


class Program(NamedTuple):
    """The step's argv as people wrote it, run in `workdir`."""

    words: tuple[str, ...]
    workdir: str
    where: str
    where_words: tuple[str, ...] = ()

    def where_of(self, index: int) -> str:
        """The place of one word."""
        return self.where_words[index] if index < len(self.where_words) else self.where


class Copy(NamedTuple):
    """A git working copy, and the branch or commit that the job asks for; `why` names who does."""

    folder: str
    where: str
    branch: str | None = None
    commit: str | None = None
    where_wanted: str = ""
    why: str = ""


class Packages(NamedTuple):
    """Packages that the run will import: name as pip knows it -> (why, where)."""

    python: str
    where: str
    wanted: Mapping[str, tuple[str, str]]


Fact = Union[Indexed, Rows, Model, Program, Copy, Packages]
