"""Damages checkpoints, has the framework's own loader and hpctrain judge them, and counts who is right.

The rule:

- the loader restores everything with the right values, and hpctrain says torn: **wrong**;
- the loader raises, or leaves out something that was saved, or restores another step's, and hpctrain says complete: **wrong**;
- unknown is never wrong, but counted;
- where the loader itself notices nothing (bytes inside a file changed, or a file of another step that does not tell its
  step), both answers pass: *beyond structure*, counted.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import ours
from .contract import Leaves, Writer
from .damages import Damage, copy_tree, damage
from .ranks import Team, run

LOAD_TIME_S = 120


@dataclass(frozen=True)
class Result:
    """One damage and its two judges. `truth` is whole, torn or beyond; `state` what hpctrain says."""

    writer: str
    case: str
    kind: str
    what: str
    truth: str
    why: str
    state: str
    reason: str

    @property
    def wrong(self) -> bool:
        if self.state == "unreadable":
            return True
        return (self.truth, self.state) in {("whole", "torn"), ("torn", "complete")}


class Bench:
    """One writer with its checkpoints, and a team of its loader that is started again when it had to be ended."""

    def __init__(self, writer: Writer, folder: str) -> None:
        self.writer = writer
        self.folder = os.path.join(folder, writer.name)
        self.whole = os.path.join(self.folder, "whole", writer.root_name)
        self.log = os.path.join(self.folder, "log")
        self.names = [writer.folder(step) for step in writer.steps]
        self.references: dict[str, list[Leaves]] = {}
        self._team: Team | None = None

    def prepare(self) -> None:
        """Have the framework write its checkpoints, unless they are there, and load each one as it is."""
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

    def load(self, root: str, name: str) -> list[tuple[str, Any]]:
        if self._team is None or self._team.ended:
            self._team = Team(self.writer.num_readers, self.writer.reader, self.log)
        return self._team.ask(root, name, timeout_s=LOAD_TIME_S)

    def truth(self, root: str, name: str, done: Damage) -> tuple[str, str]:
        """What the framework's loader makes of the checkpoint: (whole, torn or beyond; why)."""
        answers = self.load(root, name)
        texts = [str(value) for kind, value in answers if kind != "ok"]
        if texts:
            return "torn", next((text for text in texts if text != "hangs"), texts[0])
        differing: set[str] = set()
        for rank, (_, found) in enumerate(answers):
            wanted = self.references[name][rank]
            keys = {*wanted, *found}
            differing |= {key for key in keys if wanted.get(key) != found.get(key)}
        if not differing:
            return "whole", ""
        some = ", ".join(sorted(differing)[:3])
        told = [one for one in done.mixed if self.writer.names_step(one)]
        if done.mixed and not told:
            return "beyond", f"loads with other values: {some}"
        return "torn", f"{len(differing)} values are not restored: {some}"

    def close(self) -> None:
        if self._team:
            self._team.end()

    def results(
        self, seed: int, numbers: Iterator[int], keep: str | None = None
    ) -> Iterator[Result]:
        for number in numbers:
            dice = random.Random(f"{seed}/{self.writer.name}/{number}")
            name = self.names[-1] if dice.random() < 0.8 else self.names[0]
            other = next((one for one in self.names if one != name), None)
            top = os.path.join(self.folder, f"case-{number}")
            root = os.path.join(top, self.writer.root_name)
            copy_tree(os.path.dirname(self.whole), top)
            done = damage(root, name, other, dice)
            yield self.judged(root, name, done, f"{seed}/{number}")
            if keep:
                target = os.path.join(keep, f"{self.writer.name}-{number}")
                shutil.copytree(top, target, dirs_exist_ok=True)
            shutil.rmtree(top)

    def judged(self, root: str, name: str, done: Damage, case: str) -> Result:
        state, reason = ours.answer(os.path.join(root, name), self.writer.layout)
        truth, why = self.truth(root, name, done)
        what = f"{name}: {done.what}"
        return Result(self.writer.name, case, done.kind, what, truth, why, state, reason)
