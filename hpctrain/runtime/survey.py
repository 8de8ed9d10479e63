"""A checkpoint folder as it is now, and which of its checkpoints a link should start from."""

import os
import re
from typing import Dict, List, NamedTuple, Optional, Tuple

from .files import Listing, read_text
from .layout import Verdict
from .layouts import LAYOUTS
from .settings import Settings


class Candidate(NamedTuple):
    """An entry of the checkpoint folder whose name is a checkpoint's. A start checkpoint was there before the run."""

    name: str
    number: int
    is_link: bool
    is_start: bool


class Aside(NamedTuple):
    """An entry to be renamed out of the framework's way, to the first free name like `to`."""

    name: str
    to: str
    why: str


class Choice(NamedTuple):
    """Which checkpoint to start from: `kind` is `made`, `start` or `nothing`, `name` its folder name."""

    kind: str
    name: Optional[str]
    number: Optional[int]
    asides: Tuple[Aside, ...]
    notes: Tuple[str, ...]


class Survey:
    """Reads the checkpoint folder once; checkpoints are verified when asked for, each once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.layout = LAYOUTS[settings.layout]
        self.listing = Listing()
        self.folder = settings.checkpoint_dir or ""
        self._verdicts: Dict[str, Verdict] = {}
        self.candidates: List[Candidate] = []
        self.others: List[str] = []
        try:
            entries = self.listing.entries(self.folder) if self.folder else {}
        except FileNotFoundError:
            entries = {}
        real_start = os.path.realpath(settings.start) if settings.start else None
        copy = start_link(settings)[0] if settings.start else None
        for name, entry in entries.items():
            number = self.layout.number(name)
            is_link = entry.is_symlink()
            if number is None or not (is_link or entry.is_dir()):
                self.others.append(name)
                continue
            at_start = is_link and (not real_start or os.path.realpath(self.path(name)) == real_start)
            is_start = at_start or (not is_link and name == copy) or name.startswith("start-")
            self.candidates.append(Candidate(name, number, is_link, is_start))
        self.candidates.sort(key=lambda found: self.layout.order(found.name))
        self.tracker_text = self._read_tracker() if entries else None
        self.start_link = self._start_link(real_start)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    @property
    def made(self) -> List[Candidate]:
        """The checkpoints that this folder's runs made, complete or not, in the framework's order. A link never is one."""
        return [found for found in self.candidates if not found.is_link and not found.is_start]

    @property
    def tracker_path(self) -> Optional[str]:
        return self.path(self.layout.tracker) if self.layout.tracker and self.folder else None

    @property
    def named(self) -> Optional[str]:
        """The name in the tracker (`latest`), None when there is none, it is empty or unreadable as one."""
        return self.layout.named_by(self.tracker_text) if self.tracker_text is not None else None

    def verdict(self, name: str) -> Verdict:
        """Whether the checkpoint is complete, compared with the one before it; a vanished one is not."""
        if name not in self._verdicts:
            before = [found.name for found in self.made if self.layout.order(found.name) < self.layout.order(name)]
            previous = self.path(before[-1]) if before else None
            expected = self.settings.expected
            if name not in [found.name for found in self.made]:
                # Another number of nodes may have written a start checkpoint; its model must still fit.
                expected, previous = expected._replace(data_parallel=None, zero_stage=None), None
            try:
                found = self.layout.verdict(self.path(name), self.listing, expected, previous)
            except (FileNotFoundError, NotADirectoryError):
                found = Verdict(("there is no such folder",), (), 0, 0)
            self._verdicts[name] = found
        return self._verdicts[name]

    def complete(self, name: str) -> bool:
        return not self.verdict(name).faults

    def newest_complete(self) -> Optional[Candidate]:
        """The last complete checkpoint that this folder's runs made; only those above it are verified too."""
        for found in reversed(self.made):
            if self.complete(found.name):
                return found
        return None

    def written_after_tracker(self, name: str) -> bool:
        """Whether every file of a checkpoint is younger than the tracker.

        Then the save was cut off between the last shard and the tracker. Times are asked for nothing but this tie, where
        both answers are complete checkpoints.
        """
        path = self.tracker_path
        if not path:
            return False
        try:
            tracker_ns = os.stat(path).st_mtime_ns
        except OSError:
            return False
        files = self.listing.tree(self.path(name), self.layout.depth)
        return bool(files) and min(info.mtime_ns for info in files.values()) > tracker_ns

    def _start_link(self, real_start: Optional[str]) -> Optional[str]:
        """The name of the link to the start: what it should be, or what it is already where that does no harm."""
        name, hazard = start_link(self.settings) if self.settings.start else (None, "")
        if hazard or name is None or os.path.lexists(self.path(name)):
            return name
        for found in self.candidates:
            if found.is_link and os.path.realpath(self.path(found.name)) == real_start:
                return found.name
        return name

    def _read_tracker(self) -> Optional[str]:
        path = self.tracker_path
        return read_text(path) if path else None


def choose(survey: Survey) -> Choice:
    """The checkpoint to start from, and what must be moved out of the way first.

    1. Among the checkpoints made by this folder's runs: the one the tracker names, when it is complete and nothing
       complete is newer, or the newer ones were there when the tracker was written (somebody went back on purpose).
    2. Otherwise the newest complete one: the tracker is missing, empty, names an incomplete one or the start, or the
       save was cut off just before it was written.
    3. None complete: the start, if there is one. A greater number does not make a checkpoint newer than the start's:
       upstream NeoX counts from 0 after a finetune.

    What the next save would write into, or what the framework would count instead, is moved aside: a save that is cut
    off inside an older save's folder leaves shards of two trajectories that look like one whole checkpoint.
    """
    notes: List[str] = []
    made = {found.name: found for found in survey.made}
    newest = survey.newest_complete()
    chosen = newest
    named = survey.named
    if newest and named in made and named != newest.name and survey.complete(named):
        if survey.written_after_tracker(newest.name):
            notes.append(
                "`{}` is complete and newer than `{}`, which was to name it".format(newest.name, survey.layout.tracker)
            )
        else:
            chosen = made[named]
            notes.append(
                "`{}` names `{}` on purpose: newer checkpoints are moved aside".format(survey.layout.tracker, named)
            )
    if chosen:
        notes += _about_tracker(survey, chosen.name)
        return Choice("made", chosen.name, chosen.number, tuple(_asides(survey, chosen)), tuple(notes))
    start = _start(survey)
    if start or survey.settings.start:
        if start:
            notes += _about_tracker(survey, start.name)
        name = start.name if start else None
        number = start.number if start else None
        if survey.settings.start and survey.layout.by_link:
            name, number = survey.start_link, start_number(survey.settings.start)
        return Choice("start", name, number, tuple(_asides(survey, None)), tuple(notes))
    return Choice("nothing", None, None, tuple(_asides(survey, None)), tuple(notes))


def _start(survey: Survey) -> Optional[Candidate]:
    """The start checkpoint in the folder: the one the tracker names, else the last."""
    starts = [found for found in survey.candidates if found.is_start]
    named = [found for found in starts if found.name == survey.named]
    return named[0] if named else starts[-1] if starts else None


def _about_tracker(survey: Survey, chosen: str) -> List[str]:
    tracker, text = survey.layout.tracker, survey.tracker_text
    if not tracker or survey.named == chosen or (survey.layout.tracker_optional and text is None):
        return []
    if text is None:
        return ["`{}` is missing".format(tracker)]
    if not text.strip():
        return ["`{}` is empty".format(tracker)]
    named = survey.named
    if named is None:
        return ["`{}` holds {}, which names no checkpoint".format(tracker, ascii(text[:80]))]
    known = {found.name for found in survey.candidates}
    if named not in known:
        return ["`{}` names `{}`, which is not there".format(tracker, named)]
    faults = survey.verdict(named).faults
    return ["`{}` names `{}`, which is not complete: {}".format(tracker, named, faults[0])] if faults else []


def _asides(survey: Survey, chosen: Optional[Candidate]) -> List[Aside]:
    layout, settings = survey.layout, survey.settings
    out = []
    by_folder = layout.greatest or settings.counter == "greatest_folder"
    for found in survey.made:
        if chosen and layout.order(found.name) <= layout.order(chosen.name):
            continue
        faults = survey.verdict(found.name).faults
        if faults and (settings.quarantine or by_folder):
            out.append(Aside(found.name, "interrupted-{}".format(found.number), "is not complete: " + faults[0]))
        elif not faults:
            out.append(Aside(found.name, "aside-{}".format(found.number), "is newer than the checkpoint to go on from"))
    if settings.counter != "greatest_folder":
        for link in survey.candidates if layout.name == "deepspeed" and chosen else ():
            hazard = link_hazard(settings, link.number)
            if link.is_link and hazard and not link.name.startswith("start-"):
                out.append(Aside(link.name, "start-{}".format(link.number), "is a link, and " + hazard))
        return out
    # Everything below makes the fork count from, or stumble over, a name that is not the checkpoint it loads.
    for link in survey.candidates:
        if link.is_link and chosen and link.number > chosen.number:
            out.append(
                Aside(
                    link.name,
                    "aside-{}".format(link.number),
                    "is a link with a greater number than `{}`".format(chosen.name),
                )
            )
    for name in survey.others:
        if re.match(r"global_step", name):
            plain = name.replace("global_step", "step")
            out.append(Aside(name, "aside-" + plain, "would be taken for a checkpoint's name by the framework"))
    return out


def start_number(path: str) -> Optional[int]:
    """The iteration in a start checkpoint's name: `global_step423858`, `_global_step_423858_backup`, `iter_0001000`.

    The number after a known word, else the only number in the name; None when that leaves a doubt.
    """
    name = os.path.basename(os.path.normpath(path))
    known = re.findall(r"(?:global_?step|step|iter|checkpoint|epoch)[-_]?(\d{1,18})", name, re.ASCII)
    numbers = known or re.findall(r"\d{1,18}", name, re.ASCII)
    return int(numbers[0]) if len(set(map(int, numbers))) == 1 else None


def start_link(settings: Settings) -> Tuple[Optional[str], str]:
    """The name under which the start checkpoint appears in the checkpoint folder, and why it is not the usual one.

    As the framework calls checkpoints, `global_stepN`; `start-N` where that would do harm, which is then said. DeepSpeed
    loads whatever folder `latest` names. (None, "") when the start's name has no number.
    """
    number = start_number(settings.start or "")
    if number is None:
        return None, ""
    hazard = link_hazard(settings, number)
    return ("start-{}".format(number) if hazard else LAYOUTS[settings.layout].folder_name(number)), hazard


def link_hazard(settings: Settings, number: int) -> str:
    """Why a link must not be called `global_stepN` in this run's folder; empty when it may.

    A run that counts from 0 (upstream NeoX after a finetune) and comes to N saves through the link into the start itself.
    A framework that deletes old checkpoints sorts the link among them by its name: it deletes new ones instead of it, or
    stops at it, since rmtree refuses links (megatron/checkpointing.py:160-181). The tilde fork counts on from N and needs
    the name.
    """
    if LAYOUTS[settings.layout].name != "deepspeed" or settings.counter != "latest":
        return ""
    if settings.target is None:
        return "how far the run counts is not known: a save at {} would go through it into the start".format(number)
    if settings.target >= number:
        return "the run counts from 0 to {}: its save at {} would go through it into the start".format(
            settings.target, number
        )
    if settings.retention:
        return "the framework's retention would count it as a checkpoint and delete new ones, or stop at it"
    return ""
