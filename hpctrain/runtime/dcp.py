"""PyTorch's distributed checkpoints: `.metadata` names every file, with how long it must be."""

import gc
import os
import re
from typing import Any, BinaryIO, Dict, Iterable, List, NamedTuple, Optional, Tuple

from .files import FileInfo, OddFile, open_state
from .layout import Expected, Folder, Form, Report, missing, own_record_faults
from .shards import PlainUnpickler, damaged_entries

MAX_INDEX_BYTES = 1 << 30  # the index of a trillion parameters on ten thousand ranks is smaller
_RANK_INDEX = re.compile(r"__(\d+)\.metadata\Z")
_RANK_FILE = re.compile(r"__(\d+)_\d+\.distcp\Z")
_INDEX = re.compile(r"(?:__\d+)?\.metadata\Z")
# What Megatron adds to torch's index: dist_checkpointing/strategies/state_dict_saver.py, before
# 0.16 strategies/torch.py `MCoreMetadata`.
_TORCH_DIST = ("all_local_plans", "mcore_data")
_BESIDE_TORCH_DIST = ("metadata.json", "common.pt")


class Index(NamedTuple):
    """What an index says: where each file's last entry begins and ends, how many entries it has,
    and whether Megatron's torch_dist wrote it."""

    last: Dict[str, Tuple[int, int]]
    num_entries: int
    torch_dist: bool = False


class BadIndex(Exception):
    """The index itself is damaged."""


def read_index(path: str) -> Index:
    """The files that a `.metadata` names, each with the end of its last entry in bytes.

    Nothing of the pickle is run: every class in it is replaced by an empty one, so the storage
    entries (torch/distributed/checkpoint/filesystem.py `_StorageInfo`) are read as plain
    attributes. Raises BadIndex when it is cut or names no files, OSError when it cannot be read.
    """
    try:
        with os.fdopen(open_state(path), "rb") as stream:
            if os.fstat(stream.fileno()).st_size > MAX_INDEX_BYTES:
                raise BadIndex("is larger than any index")
            found = _loaded(stream)
        entries = _entries(found)
    except OddFile as error:
        raise BadIndex("is no file") from error
    except (OSError, BadIndex):
        raise
    except Exception as error:  # a cut pickle can fail in any way
        raise BadIndex("is damaged: its end is missing") from error
    last: Dict[str, Tuple[int, int]] = {}
    for name, begin, end in entries:
        if name not in last or end > last[name][1]:
            last[name] = (begin, end)
    return Index(last, len(entries), any(hasattr(found, name) for name in _TORCH_DIST))


def ranks_in(names: Iterable[str]) -> int:
    """How many ranks the shards' names show at least: `__R_I.distcp` was written by rank R."""
    ranks = [int(match.group(1)) for match in map(_RANK_FILE.match, names) if match]
    return max(ranks) + 1 if ranks else 0


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


def _entries(metadata: Any) -> List[Tuple[str, int, int]]:
    storage = getattr(metadata, "storage_data", None)
    if not isinstance(storage, dict):
        raise BadIndex("is no index of a distributed checkpoint")
    entries = []
    for info in storage.values():
        found = info.__dict__ if hasattr(info, "__dict__") else {}
        name, offset, length = (found.get(key) for key in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or not isinstance(offset, int) or not isinstance(length, int):
            raise BadIndex("is an index whose entries name no files")
        entries.append((name, offset, offset + length))
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
    own = {match.group(1) for match in map(_RANK_INDEX.match, indexes) if match}
    if own:
        # Saved without collectives: each rank's files have an index of their own.
        ranks = {match.group(1) for match in map(_RANK_FILE.match, part.files) if match}
        wanted = sorted(ranks, key=int)
        report.torn += missing("indexes", wanted, own, (prefix + "__{}.metadata").format)
        before = sum(1 for name in part.previous if _RANK_INDEX.match(name))
        if len(own) < before:
            # Nothing says how many ranks there were: fewer, or the last ones never wrote theirs.
            line = "it has indexes of {} ranks, the one before of {}"
            report.unknown.append(line.format(len(own), before))
    for name in sorted(indexes):
        fault = _judge_one(part, name, prefix, report)
        if fault:
            report.torn.append("`{}{}` {}".format(prefix, name, fault))


def _judge_one(part: Folder, name: str, prefix: str, report: Report) -> Optional[str]:
    if part.files[name].size <= 0:
        return "is empty"
    try:
        index = read_index(os.path.join(part.path, name))
    except BadIndex as error:
        return str(error)
    last = index.last
    if index.torch_dist:
        lost_beside = [one for one in _BESIDE_TORCH_DIST if one not in part.files]
        said = ["`{}{}` is missing".format(prefix, one) for one in lost_beside]
        report.torn += [line for line in said if line not in report.torn]
    if any(os.path.isabs(file) or ".." in file.split("/") for file in last):
        report.unknown.append("`{}{}` names files elsewhere".format(prefix, name))
        return None
    lost = [file for file in sorted(last) if part.files.get(file, _NO_FILE).size == -1]
    if lost:
        shown = ", ".join("`{}{}`".format(prefix, file) for file in lost[:3])
        more = ", … {} more".format(len(lost) - 3) if len(lost) > 3 else ""
        line = "{} of {} files that `.metadata` names are missing: {}{}"
        report.torn.append(line.format(len(lost), len(last), shown, more))
    there = {file: ends for file, ends in last.items() if file not in lost}
    _judge_lengths(part, there, prefix, report)
    return None


_NO_FILE = FileInfo(-1, 0)


def _judge_lengths(
    part: Folder, last: Dict[str, Tuple[int, int]], prefix: str, report: Report
) -> None:
    """Files that end before their last entry does, or with another end than torch writes."""
    short = []
    line = "`{}{}` has {} bytes, `.metadata` says {}"
    for file, (_, end) in sorted(last.items()):
        size = part.files[file].size
        if size < end:
            short.append(line.format(prefix, file, max(size, 0), end))
    report.torn += short[:3]
    if short:
        return
    damaged = damaged_entries(part.path, {file: ends for file, ends in last.items() if ends[1]})
    report.torn += ["`{}{}` {}".format(prefix, file, fault) for file, fault in damaged[:3]]
    longer = [file for file, (_, end) in sorted(last.items()) if part.files[file].size > end]
    if longer and not damaged:
        line = "`{}{}` is longer than `.metadata` says: it may be another save's"
        report.unknown.append(line.format(prefix, longer[0]))


class Dcp(Form):
    """torch.distributed.checkpoint: complete when every file that `.metadata` names is there, as
    long as it says. An empty file of a rank that had nothing to write is named by nobody."""

    name = "torch distributed checkpoint"
    marks = re.compile(r"(?:__\d+)?\.metadata\Z|[^/]*\.distcp\Z")
    # A trainer keeps small files of its own beside them.
    writes = re.compile(marks.pattern + r"|[^/]*\.(?:json|yaml|yml|txt|toml|md)\Z")

    def judge(self, folder: Folder, expected: Expected, report: Report) -> None:
        judge_index(folder, "", report)
        report.torn += own_record_faults(folder)
