"""Damages checkpoints, has the framework's own loader and hpctrain judge them, and counts who is
right.

The rule:

- the loader restores everything with the right values, and hpctrain says torn: **wrong**;
- the loader raises, or leaves out something that was saved, or restores another step's, and
  hpctrain says complete: **wrong**;
- unknown is never wrong, but counted; so is a link that refuses to start;
- where the loader itself notices nothing (bytes inside a file changed, or a file of another step
  that does not tell its step), and where what is left is what another program would have written as
  a whole (its `could_be_whole`), both answers pass: *beyond structure*, counted;
- over the folder, with its tracker damaged too, the guard must go on from the newest checkpoint
  that the loader restores. To go on from one that it does not, to pass over a newer one or to start
  over beside one, or to move one out of the way: **wrong**. Beside a checkpoint that is unknown it
  may refuse.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import ours
from .contract import Leaves, Writer
from .damages import Damage, copy_tree, damage, damage_tracker, files_of
from .ranks import Team, run

INDEXED = re.compile(r"(?:.*/)?__\d+_\d+\.distcp")
LOAD_TIME_S = 120
WRONG = {("whole", "torn"), ("torn", "complete"), ("partial", "torn"), ("partial", "complete")}


@dataclass(frozen=True)
class Result:
    """One damage and its two judges. `truth` is whole, torn, beyond or partial (left out on
    purpose); `state` what hpctrain says; `choice` what its guard would do (goes on, refuses, starts
    over; "" not asked), `fault` what is wrong with that."""

    writer: str
    case: str
    kind: str
    what: str
    truth: str
    why: str
    state: str
    reason: str
    choice: str = ""
    fault: str = ""

    @property
    def wrong(self) -> bool:
        return bool(self.fault) or self.state == "unreadable" or (self.truth, self.state) in WRONG


class Bench:
    """One writer with its checkpoints, and a team of its loader that is started again when it had
    to be ended."""

    def __init__(self, writer: Writer, folder: str) -> None:
        self.writer = writer
        self.folder = os.path.join(folder, writer.name)
        self.whole = os.path.join(self.folder, "whole", writer.root_name)
        self.log = os.path.join(self.folder, "log")
        self.names = [*map(writer.folder, writer.steps), *writer.copies]
        self.references: dict[str, list[Leaves]] = {}
        self._team: Team | None = None

    def prepare(self) -> None:
        """Have the framework write its checkpoints, unless they are there, and load each one as it
        is."""
        if not os.path.isdir(self.whole):
            os.makedirs(self.whole)
            run(self.writer.num_ranks, lambda rank: self.writer.write(self.whole, rank), self.log)
        for name in self.names:
            answers = self.load(self.whole, name)
            texts = [str(value) for kind, value in answers if kind != "ok"]
            if texts:
                raise RuntimeError(
                    f"{self.writer.name}: a whole checkpoint does not load: {texts[0]}"
                )
            self.references[name] = [value for _, value in answers]

    def same(self, one: str, other: str) -> bool:
        """Whether two names are of one step: a program may save its last one twice."""
        return self.references[one] == self.references[other]

    def load(self, root: str, name: str) -> list[tuple[str, Any]]:
        if self._team is None or self._team.ended:
            self._team = Team(self.writer.num_readers, self.writer.reader, self.log)
        return self._team.ask(root, name, timeout_s=LOAD_TIME_S)

    def truth(self, root: str, name: str, done: Damage) -> tuple[str, str]:
        """What the framework's loader makes of the checkpoint: (whole, torn or beyond; why)."""
        answers = self.load(root, name)
        texts = [str(value) for kind, value in answers if kind != "ok"]
        if texts:
            text = next((text for text in texts if text != "hangs"), texts[0])
            if self.only_untold_lost(root, name):
                return "beyond", f"another program's whole checkpoint: {text}"
            return "torn", text
        differing: set[str] = set()
        for rank, (_, found) in enumerate(answers):
            wanted = self.references[name][rank]
            keys = {*wanted, *found}
            differing |= {key for key in keys if wanted.get(key) != found.get(key)}
        if not differing and done.kind == "zeroed" and INDEXED.fullmatch(done.mixed[0]):
            # torch seeks before the entry's beginning, and finds the end of an equally long one.
            return "beyond", "bytes that its index counts are lost, and its loader does without"
        if not differing:
            return "whole", ""
        some = ", ".join(sorted(differing)[:3])
        told = [one for one in done.mixed if self.writer.names_step(one)]
        if done.mixed and not told:
            return "beyond", f"loads with other values: {some}"
        if self.only_untold_lost(root, name):
            return "beyond", f"another program's whole checkpoint: without {some}"
        return "torn", f"{len(differing)} values are not restored: {some}"

    def only_untold_lost(self, root: str, name: str) -> bool:
        """Whether files are gone, the others are as they were, and what is left could be whole."""
        path, whole = os.path.join(root, name), os.path.join(self.whole, name)
        if not os.path.isdir(whole):
            return False  # a checkpoint that is one file has nothing to lose but itself
        left, all_files = set(files_of(path)), set(files_of(whole))
        same = [
            os.path.samefile(os.path.join(path, one), os.path.join(whole, one))
            for one in left & all_files
        ]
        return left < all_files and all(same) and self.writer.could_be_whole(left)

    def close(self) -> None:
        if self._team:
            self._team.end()

    def results(
        self, seed: int, numbers: Iterator[int], keep: str | None = None
    ) -> Iterator[Result]:
        for number in numbers:
            dice = random.Random(f"{seed}/{self.writer.name}/{number}")
            newest = self.writer.folder(self.writer.steps[-1])
            older = [one for one in self.names if one != newest]
            name = newest if dice.random() < 0.8 or not older else dice.choice(older)
            other = next((one for one in self.names if not self.same(one, name)), None)
            top = os.path.join(self.folder, f"case-{number}")
            root = os.path.join(top, self.writer.root_name)
            copy_tree(os.path.dirname(self.whole), top)
            tracker = damage_tracker(self.writer, root, dice)
            done = damage(root, name, other, dice)
            yield self.judged(root, name, done, f"{seed}/{number}", tracker)
            if keep:
                target = os.path.join(keep, f"{self.writer.name}-{number}")
                shutil.copytree(top, target, dirs_exist_ok=True)
            shutil.rmtree(top)

    def judged(self, root: str, name: str, done: Damage, case: str, tracker: str = "") -> Result:
        state, reason = ours.answer(os.path.join(root, name), self.writer.layout)
        truth, why = self.truth(root, name, done)
        if truth == "whole" and not self.writer.resumes:
            truth = "partial"
        choice, fault = self.chosen(root, name, truth)
        undamaged = done.kind == "none" and tracker in ("", "kept") and state == "complete"
        if choice == "refuses" and undamaged:
            fault = "refuses, though nothing is damaged"
        told = f"{name}: {done.what}" + (f"; tracker {tracker}" if tracker else "")
        return Result(
            self.writer.name, case, done.kind, told, truth, why, state, reason, choice, fault
        )

    def first_of(self, name: str) -> str:
        return next(one for one in self.names if self.same(one, name))

    def chosen(self, root: str, name: str, truth: str) -> tuple[str, str]:
        """What the guard decides over the folder, in a word, and what is wrong with it; "" where it
        cannot be asked."""
        decision = ours.decision(root, self.writer.layout)
        if decision is None:
            return "", ""
        marker = self.writer.marker
        if marker and not os.path.exists(os.path.join(root, name, marker)):
            truth = "torn"
        others = "whole" if self.writer.resumes else "partial"
        truths = dict.fromkeys(self.names, others) | {name: truth}
        ranks = {one: self.names.index(self.first_of(one)) for one in self.names}
        fault = folder_fault(decision, truths, ranks)
        if decision.refusal:
            return "refuses", fault
        return ("goes on" if decision.name else "starts over"), fault


def folder_fault(decision: ours.Decision, truths: dict[str, str], ranks: dict[str, int]) -> str:
    """What is wrong with a decision, given what each checkpoint is and which are newer; "" when
    nothing is."""
    if decision.refusal:
        return ""
    whole = [name for name, truth in truths.items() if truth == "whole"]
    moved = [name for name in decision.moved if name in whole]
    if moved:
        return f"moves `{moved[0]}` out of the way, which its loader restores"
    if not decision.name:
        return f"starts over beside `{whole[-1]}`, which its loader restores" if whole else ""
    if truths.get(decision.name, "torn") in ("torn", "partial"):
        return f"goes on from `{decision.name}`, which its loader does not restore"
    newer = [name for name in whole if ranks[name] > ranks[decision.name]]
    return f"goes on from `{decision.name}`, older than `{newer[-1]}`" if newer else ""
