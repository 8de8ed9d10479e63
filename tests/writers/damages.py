"""Seeded damages to a folder of checkpoints, as crashes, full disks and interrupted copies leave
it.

Presence, length, emptiness and mixture of steps only: nobody can see by structure that bytes inside
a tensor are wrong.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from dataclasses import dataclass

from .contract import Writer

PAGE = 4096
RANK_IN_NAME = (
    r"__(\d+)_\d+\.distcp",
    r"(?:.*/)?rank_?(\d+)\b.*",
    r".*_rank_?(\d+)\b.*",
    r"rng_state_(\d+)\.pth",
    r"random_states_(\d+)\.pkl",
    r".*pp_rank_(\d+)_mp_rank.*",
    r"(?:.*/)?mp_rank_(\d+).*",
)
INDEX = re.compile(
    r"(?:.*/)?(?:\.metadata|.*\.index\.json|metadata\.json|\.metadata\.json|common\.pt"
    r"|meta\.pt|trainer_state\.json)"
)
FOREIGN = (
    "README.md",
    "notes.txt",
    "train.log",
    ".DS_Store",
    "._checkpoint",
    ".nfs0000000000a1",
    "events.out.tfevents.17",
    "core.4711",
    ".rsync-filter",
    "slurm-123.out",
    ".git",
)


@dataclass(frozen=True)
class Damage:
    """One thing that was done to a checkpoint; `mixed` are the files that now come from another
    step."""

    kind: str
    what: str
    mixed: tuple[str, ...] = ()


def files_of(path: str) -> list[str]:
    """The files of a checkpoint (a folder, or the file itself as ""), relative, in alphabetical
    order."""
    if os.path.isfile(path):
        return [""]
    found = []
    for top, _, names in os.walk(path):
        found += [os.path.relpath(os.path.join(top, name), path) for name in names]
    return sorted(found)


def copy_tree(source: str, target: str) -> None:
    """A copy whose files are hard links: a damage replaces a file, it never writes into one."""
    shutil.copytree(source, target, copy_function=os.link, symlinks=True)


def rewrite(path: str, content: bytes) -> None:
    os.unlink(path)
    with open(path, "wb") as stream:
        stream.write(content)


def read(path: str) -> bytes:
    with open(path, "rb") as stream:
        return stream.read()


class Damager:
    """Damages one checkpoint below `root`, given the same file tree of another step as material for
    mixtures."""

    def __init__(self, root: str, name: str, other: str | None, dice: random.Random) -> None:
        self.path = os.path.join(root, name)
        self.other = os.path.join(root, other) if other else None
        self.dice = dice
        self.files = files_of(self.path)
        self.is_file = self.files == [""]

    def full(self, name: str) -> str:
        return os.path.join(self.path, name) if name else self.path

    def pick(self) -> str:
        return self.dice.choice(self.files)

    def do(self, kind: str) -> Damage | None:
        """None where the checkpoint has nothing of that kind to damage."""
        return getattr(self, kind)()

    def gone(self) -> Damage:
        name = self.pick()
        os.unlink(self.full(name))
        return Damage("gone", name)

    def cut(self) -> Damage | None:
        name = self.pick()
        content = read(self.full(name))
        if len(content) < 2:
            return None
        pages = list(range(PAGE, len(content), PAGE))
        ways = ["anywhere", "end", *(["page"] if pages else [])]
        way = self.dice.choice(ways)
        if way == "page":
            length = self.dice.choice(pages)
        elif way == "end":
            length = len(content) - self.dice.randint(1, min(24, len(content) - 1))
        else:
            length = self.dice.randint(1, len(content) - 1)
        rewrite(self.full(name), content[:length])
        return Damage("cut", f"{name} {len(content)} -> {length}")

    def emptied(self) -> Damage | None:
        name = self.pick()
        if not os.path.getsize(self.full(name)):
            return None
        rewrite(self.full(name), b"")
        return Damage("emptied", name)

    def zeroed(self) -> Damage | None:
        """The tail holds zeros, as after a power loss on a file system that allocates first."""
        name = self.pick()
        content = read(self.full(name))
        if len(content) < 2:
            return None
        most = len(content) - 1
        length = self.dice.choice([min(most, self.dice.randint(1, 64)), self.dice.randint(1, most)])
        if len(content) > PAGE and self.dice.random() < 0.3:
            length = len(content) % PAGE or PAGE
        tail = b"\0" * length
        if content.endswith(tail):
            return None
        rewrite(self.full(name), content[:-length] + tail)
        return Damage("zeroed", f"{name} last {length} of {len(content)}", (name,))

    def mixed(self) -> Damage | None:
        """One file is another step's."""
        if self.other is None:
            return None
        theirs = set(files_of(self.other)) & set(self.files)
        unlike = [one for one in sorted(theirs) if self._differs(one)]
        if not unlike:
            return None
        name = self.dice.choice(unlike)
        self._take(name)
        return Damage("mixed", name, (name,))

    def _differs(self, name: str) -> bool:
        return read(self.full(name)) != read(self._theirs(name))

    def _theirs(self, name: str) -> str:
        return os.path.join(self.other or "", name) if name else str(self.other)

    def _take(self, name: str) -> None:
        os.unlink(self.full(name))
        with open(self.full(name), "wb") as stream:
            stream.write(read(self._theirs(name)))

    def rank_gone(self) -> Damage | None:
        ranks: dict[tuple[str, str], list[str]] = {}
        for name in self.files:
            for pattern in RANK_IN_NAME:
                match = re.fullmatch(pattern, name if "/" in pattern else os.path.basename(name))
                if match:
                    ranks.setdefault((pattern, match.group(1)), []).append(name)
                    break
        if not ranks:
            return None
        wanted = self.dice.choice(sorted({rank for _, rank in ranks}))
        lost = sorted(
            name for (_, rank), names in ranks.items() if rank == wanted for name in names
        )
        for name in lost:
            os.unlink(self.full(name))
        return Damage("rank gone", f"rank {wanted}: {', '.join(lost)}")

    def copying(self) -> Damage | None:
        """A copy in progress: some files are there, one of them perhaps in part."""
        if len(self.files) < 2:
            return None
        order = list(self.files)
        if self.dice.random() < 0.5:
            self.dice.shuffle(order)
        there = self.dice.randint(1, len(order) - 1)
        for name in order[there:]:
            os.unlink(self.full(name))
        last = order[there - 1]
        content = read(self.full(last))
        partly = len(content) > 1 and self.dice.random() < 0.5
        if partly:
            rewrite(self.full(last), content[: self.dice.randint(1, len(content) - 1)])
        return Damage(
            "copying", f"{there} of {len(order)} files, the last {'in part' if partly else 'whole'}"
        )

    def two_copies(self) -> Damage | None:
        """Two copies into one folder, both interrupted: of another step first, then of this one."""
        if self.other is None or self.is_file:
            return None
        theirs = files_of(self.other)
        order = sorted(set(self.files) | set(theirs))
        if self.dice.random() < 0.5:
            self.dice.shuffle(order)
        ours = self.dice.randint(1, len(order))
        before = self.dice.randint(0, len(order))
        taken = []
        for index, name in enumerate(order):
            if index < ours:
                continue
            if name in self.files:
                os.unlink(self.full(name))
            if index < before and name in theirs:
                os.makedirs(os.path.dirname(self.full(name)), exist_ok=True)
                shutil.copyfile(os.path.join(self.other, name), self.full(name))
                taken.append(name)
        return Damage(
            "two copies", f"first {ours} of this step, up to {before} of another", tuple(taken)
        )

    def folder_gone(self) -> Damage | None:
        folders = sorted({os.path.dirname(name) for name in self.files if os.path.dirname(name)})
        if not folders:
            return None
        name = self.dice.choice(folders)
        shutil.rmtree(self.full(name))
        return Damage("folder gone", name)

    def index_gone(self) -> Damage | None:
        found = [name for name in self.files if INDEX.fullmatch(name)]
        if not found:
            return None
        name = self.dice.choice(found)
        os.unlink(self.full(name))
        return Damage("index gone", name)

    def foreign(self) -> Damage | None:
        """A file of nobody's beside the others: the checkpoint is as whole as before."""
        if self.is_file:
            return None
        folders = sorted({os.path.dirname(name) for name in self.files})
        name = os.path.join(self.dice.choice(folders), self.dice.choice(FOREIGN))
        if os.path.exists(self.full(name)):
            return None
        content = self.dice.choice([b"", b"some words\n", b"\0" * 5000])
        with open(self.full(name), "wb") as stream:
            stream.write(content)
        return Damage("foreign", f"{name} ({len(content)} bytes)")

    def none(self) -> Damage:
        return Damage("none", "")


KINDS = {
    "none": 3,
    "gone": 14,
    "cut": 16,
    "emptied": 8,
    "zeroed": 8,
    "mixed": 6,
    "rank_gone": 8,
    "copying": 12,
    "two_copies": 8,
    "folder_gone": 6,
    "index_gone": 5,
    "foreign": 6,
}


def damage(root: str, name: str, other: str | None, dice: random.Random) -> Damage:
    """Do one damage to the checkpoint `name` below `root`, chosen by `dice` among those that it has
    a place for."""
    kinds = list(KINDS)
    while True:
        kind = dice.choices(kinds, weights=[KINDS[one] for one in kinds])[0]
        done = Damager(root, name, other, dice).do(kind)
        if done is not None:
            return done


TRACKERS = {"kept": 8, "stale": 4, "gone": 2, "empty": 2, "garbage": 2, "away": 1}
GARBAGE = (
    b"\0" * 11,
    b"\xff\xfe\x80",
    b"../../etc/passwd",
    b"nothing of the kind\n",
    b"99999999999999999999",
)


def damage_tracker(writer: Writer, root: str, dice: random.Random) -> str:
    """Do to the tracker what crashes do; returns what was done, "" where the writer has none.

    A stale one is what a save leaves that was cut off between its last shard and the tracker: older
    than that save.
    """
    if not writer.tracker:
        return ""
    path = os.path.join(root, writer.tracker)
    kinds = list(TRACKERS)
    kind = dice.choices(kinds, weights=[TRACKERS[one] for one in kinds])[0]
    if kind == "kept":
        return kind
    os.unlink(path)
    if kind == "stale":
        writer.tell(root, writer.steps[0])
        newest = os.path.join(root, writer.folder(writer.steps[-1]))
        times = [os.stat(os.path.join(newest, name)).st_mtime for name in files_of(newest)]
        before = min(times, default=0.0) - 5
        os.utime(path, (before, before))
    elif kind != "gone":
        content = {"empty": b"", "away": writer.tracker_text(777).encode()}
        with open(path, "wb") as stream:
            stream.write(content.get(kind, dice.choice(GARBAGE)))
    return kind
