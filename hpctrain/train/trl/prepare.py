"""The data, tokenized once and kept beside the checkpoints, so that no link of a chain does it
again.

    CHECKPOINT_DIR/prepared-<key>/data.arrow       input_ids, labels: one row each
                                  manifest.json    its sha256, its size, rows, tokens, and what
                                                   they were made from

The key hashes the data, the tokenizer and the settings that shape tokens, so nothing stale is ever
read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hpctrain.base.errors import EnvironmentFault, UsageError, need
from hpctrain.base.files import sha256_of, sync
from hpctrain.config.trainers.trl import HfSftConfig
from hpctrain.train.core.data_files import find_files, parsed_rows
from hpctrain.train.core.export import tokenizer_files
from hpctrain.train.dpo.pairs import load_tokenizer
from hpctrain.train.trl.rows import Encoder, marking_template

DATA, MANIFEST = "data.arrow", "manifest.json"
_FORM = 1  # raise it when the same input gives other tokens
_ROWS_AT_ONCE = 1000
_COUNTS = (
    "rows",
    "tokens",
    "trained_tokens",
    "truncated",
    "source_rows",
    "dropped",
    "longest",
    "largest_token",
)


@dataclass(frozen=True)
class Prepared:
    """Prepared data: `path` of its arrow file, whose content has `sha256` and `num_bytes`.

    `source_rows` were read; `dropped` had no token to train on; `trained_tokens` count towards the
    loss. `longest` row in tokens and `largest_token` are 0 in what earlier versions prepared.
    """

    path: str
    sha256: str
    num_bytes: int
    rows: int
    tokens: int
    trained_tokens: int
    truncated: int
    source_rows: int
    dropped: int
    longest: int = 0
    largest_token: int = 0


def prepare(config: HfSftConfig, folder: str, say: Callable[[str], None]) -> Prepared:
    """The prepared data of a config in `folder`; it is made unless it lies there already, and
    appears whole or not at all.

    Raises UsageError for bad rows (the first 20, with their places), a data file of another
    checksum or number of rows than the config says, and a tokenizer that does not load;
    EnvironmentFault for what cannot be read or written.
    """
    files = find_files(config.dataset_path, "train")
    sums = [_sum_of(file) for file in files]
    if config.data_sha256 and [config.data_sha256] != sums:
        what = (
            f"its checksum is {sums[0]}"
            if len(sums) == 1
            else f"`data_sha256` is of one file, and there are {len(sums)}"
        )
        raise UsageError(
            f"this is not the data that the run names: {what}",
            where=config.dataset_path,
            why=f"`data_sha256: {config.data_sha256}`",
            hint="copy it again, or correct the checksum",
        )
    target = os.path.join(folder, f"prepared-{_key(config, files, sums)[:16]}")
    found = read(target)
    if found is None:
        say(f"tokenizing {config.dataset_path}")
        found = _make(config, files, target)
        say(
            f"{found.rows:,} rows with {found.tokens:,} tokens ({found.truncated:,} truncated,"
            f" {found.dropped:,} without a token to train on)"
        )
    if config.dataset_rows and config.dataset_rows != found.source_rows:
        raise UsageError(
            f"the data has {found.source_rows:,} rows, and the run says {config.dataset_rows:,}",
            where=config.dataset_path,
            why="the number of steps was computed from it",
            hint=f"set `dataset_rows: {found.source_rows}`",
        )
    return found


def read(folder: str) -> Prepared | None:
    """The prepared data in `folder`, None where there is none, or not all of it."""
    path = os.path.join(folder, DATA)
    try:
        with open(os.path.join(folder, MANIFEST), encoding="utf-8") as file:
            found = Prepared(**{**json.load(file)["data"], "path": path})
        return found if os.path.getsize(path) == found.num_bytes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sum_of(path: str) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise EnvironmentFault(f"cannot read it: {error.strerror}", where=path) from error


def _key(config: HfSftConfig, files: list[str], sums: list[str]) -> str:
    """What decides the tokens."""
    settings = (config.max_length, config.completion_only_loss, config.assistant_only_loss)
    digest = hashlib.sha256(" ".join(map(str, (_FORM, *settings))).encode() + b"\n")
    for path, content in zip(files, sums):
        digest.update(f"{os.path.splitext(path)[1]} {content}\n".encode())
    for name in tokenizer_files(config.model_name):
        digest.update(f"{name} {_sum_of(os.path.join(config.model_name, name))}\n".encode())
    return digest.hexdigest()


def _make(config: HfSftConfig, files: list[str], target: str) -> Prepared:
    encoder, parent = _encoder(config), os.path.dirname(target)
    staged = tempfile.mkdtemp(prefix=f".{os.path.basename(target)[:60]}.", dir=parent)
    try:
        os.chmod(staged, 0o755)
        counts = _write_rows(encoder, files, os.path.join(staged, DATA))
        if not counts["rows"]:
            raise UsageError(
                "no row is left to train on",
                where=config.dataset_path,
                hint="raise `max_length`; rows whose prompt alone fills it are dropped",
            )
        path = os.path.join(staged, DATA)
        found = Prepared(
            os.path.join(target, DATA), sha256_of(path), os.path.getsize(path), **counts
        )
        about = {"data": asdict(found), "files": files, "max_length": config.max_length}
        with open(os.path.join(staged, MANIFEST), "w", encoding="utf-8") as file:
            json.dump(about, file, indent=1)
        for name in (DATA, MANIFEST, "."):
            sync(os.path.join(staged, name))
        if os.path.lexists(target):  # what `read` found damaged; nobody else makes this name
            os.rename(target, tempfile.mkdtemp(prefix="aside-prepared-", dir=parent) + "/damaged")
        os.rename(staged, target)
        sync(parent)
    except BaseException as error:
        shutil.rmtree(staged, ignore_errors=True)
        if isinstance(error, OSError):
            raise EnvironmentFault(
                f"cannot keep the prepared data: {error.strerror or error}", where=parent
            ) from error
        raise
    return found


def _write_rows(encoder: Encoder, files: list[str], path: str) -> dict[str, int]:
    """Write the encoded rows as an arrow stream; the numbers of `Prepared`."""
    pyarrow = need("pyarrow", "hf")
    ints = pyarrow.list_(pyarrow.int32())
    schema = pyarrow.schema([("input_ids", ints), ("labels", ints)])
    counts: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
    rows = parsed_rows(files, lambda row, where: encoder.encode(row))
    with pyarrow.OSFile(path, "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        while batch := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            kept = [row for row in batch if row is not None]
            counts.update(source_rows=len(batch), dropped=len(batch) - len(kept), rows=len(kept))
            for ids, labels in kept:
                _count(counts, ids, labels, encoder.max_length)
            columns = [pyarrow.array([row[part] for row in kept], ints) for part in (0, 1)]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))
    return dict(counts)


def _count(counts: Counter[str], ids: list[int], labels: list[int], max_length: int) -> None:
    counts.update(
        tokens=len(ids),
        truncated=int(len(ids) == max_length),
        trained_tokens=sum(label >= 0 for label in labels[1:]),
    )
    counts["longest"] = max(counts["longest"], len(ids))
    counts["largest_token"] = max(counts["largest_token"], *ids)


def _encoder(config: HfSftConfig) -> Encoder:
    tokenizer = load_tokenizer(config.model_name)
    template = None
    if config.assistant_only_loss:
        try:
            template = marking_template(tokenizer)
        except ValueError as error:
            raise UsageError(
                str(error),
                where=config.model_name,
                why="`assistant_only_loss: true` needs it",
                hint="train on all of the dialogue, or put {% generation %} around the turns in it",
            ) from error
    return Encoder(
        tokenizer,
        config.max_length,
        config.completion_only_loss,
        config.assistant_only_loss,
        template,
    )


def load_rows(path: str) -> Any:
    """The prepared rows as a `datasets.Dataset`, mapped from the file and never copied into
    memory."""
    return need("datasets", "hf").Dataset.from_file(path)
