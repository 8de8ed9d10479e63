"""What a checkpoint is, for any training system: the contract that the layouts fill in."""

import re
from statistics import median
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Pattern, Set, Tuple

from . import shards
from .files import FileInfo, Listing


class Expected(NamedTuple):
    """What the plan knows of a checkpoint's shards; None where it does not. 0 pipeline stages is NeoX's "no pipeline"."""

    tensor_parallel: Optional[int] = None
    pipeline_parallel: Optional[int] = None
    data_parallel: Optional[int] = None
    zero_stage: Optional[int] = None


class Verdict(NamedTuple):
    """Why a checkpoint cannot be loaded (`faults`, none when complete), where it differs from the plan (`mismatches`)."""

    faults: Tuple[str, ...]
    mismatches: Tuple[str, ...]
    num_files: int
    num_bytes: int


class Folder:
    """One checkpoint folder: its files with their sizes, each stat'ed once, and the previous checkpoint's for comparison."""

    def __init__(self, path: str, listing: Listing, depth: int = 0, previous: Optional[str] = None) -> None:
        self.path = path
        self.files: Dict[str, FileInfo] = listing.tree(path, depth) if depth else dict(listing.files(path))
        self.previous: Dict[str, FileInfo] = {}
        if previous:
            try:
                self.previous = listing.tree(previous, depth) if depth else dict(listing.files(previous))
            except OSError:
                pass  # only a comparison is lost

    def matching(self, pattern: Pattern[str]) -> Dict[Tuple[Any, ...], str]:
        """The files that `pattern` matches whole, by its groups (numbers as int)."""
        found = {}
        for name in self.files:
            match = pattern.match(name)
            if match:
                found[tuple(int(group) for group in match.groups() if group is not None and group.isdigit())] = name
        return found


class Layout:
    """How one training system lays its checkpoints out. Subclasses state, with the source, when one is complete."""

    name = ""
    pattern: Pattern[str] = re.compile(r"(?!)")  # the whole name of a checkpoint folder, its number in a group
    tracker: Optional[str] = None  # the file that names the checkpoint to resume from
    tracker_optional = False  # the tracker is kept up to date only where somebody began one
    by_link = False  # a start checkpoint is brought in as a link inside the checkpoint folder
    greatest = False  # the framework resumes from the greatest number it finds, complete or not
    depth = 0  # levels of folders below the checkpoint that hold shards

    def number(self, name: str) -> Optional[int]:
        """The number of a checkpoint folder's name, None when it is no checkpoint."""
        match = self.pattern.match(name)
        return int(match.group(match.lastindex or 1)) if match else None

    def folder_name(self, number: int) -> str:
        raise NotImplementedError

    def order(self, name: str) -> Tuple[int, int]:
        """Sorts checkpoint names as the framework ranks them, the one it prefers last."""
        return (0, self.number(name) or 0)

    def named_by(self, text: str) -> Optional[str]:
        """The checkpoint folder that the tracker's text names, None when it names none."""
        text = text.strip()
        return text if text and "/" not in text and "\0" not in text and text not in (".", "..") else None

    def tracker_text(self, name: str) -> str:
        return name

    def verdict(self, path: str, listing: Listing, expected: Expected, previous: Optional[str] = None) -> Verdict:
        """Whether the checkpoint at `path` is complete; raises OSError when the folder cannot be read."""
        folder = Folder(path, listing, self.depth, previous)
        faults: List[str] = []
        mismatches: List[str] = []
        self.judge(folder, expected, faults, mismatches)
        counted = [info.size for info in folder.files.values() if info.size > 0]
        return Verdict(tuple(faults), tuple(mismatches), len(folder.files), sum(counted))

    def judge(self, folder: Folder, expected: Expected, faults: List[str], mismatches: List[str]) -> None:
        raise NotImplementedError

    def export_faults(self, folder: str, name: str, listing: Listing) -> List[str]:
        """What is missing of the model that the framework exports into `folder` after checkpoint `name`."""
        return []


def missing(what: str, wanted: Iterable[Any], found: Set[Any], name: Any) -> List[str]:
    """One line for the members of `wanted` that are not in `found`; `name` formats one as a file name."""
    lost = [name(*item) if isinstance(item, tuple) else name(item) for item in wanted if item not in found]
    if not lost:
        return []
    more = ", … {} more".format(len(lost) - 3) if len(lost) > 3 else ""
    return ["{} of {} {} missing: {}{}".format(
        len(lost), len(lost) + len(found), what, ", ".join("`{}`".format(one) for one in lost[:3]), more)]  # fmt: skip


def opened(folder: Folder, names: Iterable[str]) -> List[str]:
    """What is wrong inside the files, each looked at by its first and last bytes; only the first few are spelled out."""
    faults = shards.damaged(folder.path, {name: folder.files[name].size for name in names})
    return faults if len(faults) <= 3 else faults[:3] + ["{} more files are damaged".format(len(faults) - 3)]


def implausible(folder: Folder, kinds: Iterable[Iterable[str]]) -> List[str]:
    """Files far smaller than their siblings of the same kind, or than the same file of the previous checkpoint.

    Shards of one kind hold equal parts of one model, and nothing shrinks from one checkpoint to the next: half is never
    right. (Archives cut short are found exactly, by `shards.damage`; this catches formats without an end mark.)
    """
    faults = []
    for names in kinds:
        names = sorted(names)
        sizes = [folder.files[name].size for name in names]
        usual = median(sizes) if len(sizes) > 2 else max(sizes + [0])
        before = {name: folder.previous[name].size for name in names if name in folder.previous}
        comparable = len(before) == len(names)  # else another number of ranks wrote it
        for name, size in zip(names, sizes):
            if 2 * size < usual:
                faults.append("`{}` has {} bytes, its siblings about {:.0f}".format(name, size, usual))
            elif comparable and 2 * size < before[name]:
                faults.append("`{}` has {} bytes, {} in the checkpoint before".format(name, size, before[name]))
    return faults[:3]
