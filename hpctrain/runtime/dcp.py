"""PyTorch's distributed checkpoints: `.metadata` names every file, with how long it must be."""

import gc
import os
import re
from typing import Any, BinaryIO, Dict, List, NamedTuple, Optional, Tuple

from .files import OddFile, open_state
from .layout import Expected, Folder, Form, Report
from .shards import PlainUnpickler

MAX_INDEX_BYTES = 1 << 30  # the index of a trillion parameters on ten thousand ranks is smaller
_INDEX = re.compile(r"(?:__\d+)?\.metadata\Z")


class Index(NamedTuple):
    """What an index says: how long each file must be at least, and how many entries it has."""

    lengths: Dict[str, int]
    num_entries: int


class BadIndex(Exception):
    """The index itself is damaged."""


def read_index(path: str) -> Index:
    """The files that a `.metadata` names, each with the end of its last entry in bytes.

    Nothing of the pickle is run: every class in it is replaced by an empty one, so the storage
    entries (torch/distributed/checkpoint/filesystem.py `_StorageInfo`) are read as plain attributes.
    Raises BadIndex when it is cut or names no files, OSError when it cannot be read.
    """
    try:
        with os.fdopen(open_state(path), "rb") as stream:
            if os.fstat(stream.fileno()).st_size > MAX_INDEX_BYTES:
                raise BadIndex("is larger than any index")
            entries = _entries(_loaded(stream))
    except OddFile as error:
        raise BadIndex("is no file") from error
    except (OSError, BadIndex):
        raise
    except Exception as error:  # a cut pickle can fail in any way
        raise BadIndex("is damaged: its end is missing") from error
    lengths: Dict[str, int] = {}
    for name, end in entries:
        if end > lengths.get(name, -1):
            lengths[name] = end
    return Index(lengths, len(entries))


def _loaded(stream: BinaryIO) -> Any:
    """The pickle's top object. Collecting garbage among a million small objects takes five times as
    long as reading them."""
    collected = gc.isenabled()
    gc.disable()
    try:
        return PlainUnpickler(stream).load()
    finally:
        if collected:
            gc.enable()


def _entries(metadata: Any) -> List[Tuple[str, int]]:
    storage = getattr(metadata, "storage_data", None)
    if not isinstance(storage, dict):
        raise BadIndex("is no index of a distributed checkpoint")
    entries = []
    for info in storage.values():
        found = info.__dict__ if hasattr(info, "__dict__") else {}
        name, offset, length = (found.get(key) for key in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or not isinstance(offset, int) or not isinstance(length, int):
            raise BadIndex("is an index whose entries name no files")
        entries.append((name, offset + length))
    return entries


def judge_index(folder: Folder, where: str, report: Report) -> None:
    """Judge the distributed checkpoint in sub-folder `where` ("" for the folder itself): the
    coordinator writes `.metadata` by rename after all ranks have written (`finish`)."""
    part = folder.below(where) if where else folder
    prefix = where + "/" if where else ""
    indexes = [name for name in part.files if _INDEX.match(name)]
    if not indexes:
        report.torn.append("`{}.metadata`, which is written last, is missing".format(prefix))
        return
    for name in sorted(indexes):
        fault = _judge_one(part, name, prefix, report)
        if fault:
            report.torn.append("`{}{}` {}".format(prefix, name, fault))


def _judge_one(part: Folder, name: str, prefix: str, report: Report) -> Optional[str]:
    if part.files[name].size <= 0:
        return "is empty"
    try:
        lengths = read_index(os.path.join(part.path, name)).lengths
    except BadIndex as error:
        return str(error)
    lost, short, longer = [], [], []
    for file, length in sorted(lengths.items()):
        if os.path.isabs(file) or ".." in file.split("/"):
            report.unknown.append("`{}{}` names files elsewhere".format(prefix, name))
            return None
        info = part.files.get(file)
        if info is None or info.size == -1:
            lost.append(file)
        elif info.size < length:
            short.append("`{}{}` has {} bytes, `.metadata` says {}".format(prefix, file, max(info.size, 0), length))
        elif info.size > length:
            longer.append(file)
    if lost:
        shown = ", ".join("`{}{}`".format(prefix, file) for file in lost[:3])
        more = ", … {} more".format(len(lost) - 3) if len(lost) > 3 else ""
        line = "{} of {} files that `.metadata` names are missing: {}{}"
        report.torn.append(line.format(len(lost), len(lengths), shown, more))
    report.torn += short[:3]
    if longer and not lost and not short:
        line = "`{}{}` is longer than `.metadata` says: it may be another save's"
        report.unknown.append(line.format(prefix, longer[0]))
    return None


class Dcp(Form):
    """torch.distributed.checkpoint: complete when every file that `.metadata` names is there, as
    long as it says. An empty file of a rank that had nothing to write is named by nobody."""

    name = "torch distributed checkpoint"
    marks = re.compile(r"(?:__\d+)?\.metadata\Z|[^/]*\.distcp\Z")
    # A trainer keeps small files of its own beside them.
    writes = re.compile(marks.pattern + r"|[^/]*\.(?:json|yaml|yml|txt|toml|md)\Z")

    def judge(self, folder: Folder, expected: Expected, report: Report) -> None:
        judge_index(folder, "", report)
