"""Brings a start checkpoint into a checkpoint folder: a relative link (or a copy) and the file that names it, both atomic."""

import errno
import os
from typing import List, NamedTuple, Optional, Tuple

from .copying import bring
from .files import Listing, make_folder, sync_folder, write_atomic
from .layouts import LAYOUTS
from .settings import Settings
from .survey import Survey, start_link, start_number


class StartProblem(Exception):
    """The start checkpoint cannot be used."""


class Bootstrap(NamedTuple):
    """What a bootstrap will make. `link` and `target` are None where the layout takes the start by its path alone."""

    folder: str
    start: str
    number: Optional[int]
    link: Optional[str]
    target: Optional[str]
    renamed_from: Optional[str]
    tracker: Optional[str]
    tracker_text: Optional[str]
    num_files: int
    num_bytes: int
    notes: Tuple[str, ...]
    way: str = "symlink"


def plan_bootstrap(settings: Settings, survey: Optional[Survey] = None, verify: bool = True) -> Bootstrap:
    """Look at the start checkpoint and at the folder; write nothing.

    Raises StartProblem when the start is missing, incomplete, of another model shape than the plan's, has no iteration in
    its name, or when the folder already has something else under its name.
    """
    start, folder = settings.start, settings.checkpoint_dir
    if not start or not folder:
        raise StartProblem("there is no start checkpoint to bootstrap from")
    layout = LAYOUTS[settings.layout]
    notes: List[str] = []
    num_files = num_bytes = 0
    if not os.path.isdir(start):
        gone = (
            "is a link to nothing"
            if os.path.islink(start)
            else "is no folder"
            if os.path.exists(start)
            else "is not there"
        )
        raise StartProblem("the start checkpoint `{}` {}".format(start, gone))
    number = start_number(start)
    if layout.by_link or layout.number(os.path.basename(start)) is not None:
        num_files, num_bytes = _verified(settings, start) if verify else (0, 0)
    if not layout.by_link:
        return Bootstrap(folder, start, number, None, None, None, None, None, num_files, num_bytes, ())
    survey = survey or Survey(settings)
    link, hazard = survey.start_link, start_link(settings)[1]
    if number is None or link is None:
        raise StartProblem("the iteration of the start checkpoint cannot be read from its name `{}`; give it, or a link to "
                           "it, a name such as `{}`".format(os.path.basename(start), layout.folder_name(1000)))  # fmt: skip
    if os.path.basename(start) != link:
        why = ", not `{}`: {}".format(layout.folder_name(number), hazard) if hazard else ""
        notes.append(
            "`{}` is iteration {}; its link is called `{}`{}".format(os.path.basename(start), number, link, why)
        )
    renamed = _present_link(survey, start, link)
    target = None if os.path.lexists(os.path.join(folder, link)) or renamed else _relative(start, folder)
    return Bootstrap(folder, start, number, link, target, renamed, layout.tracker, layout.tracker_text(link),
                     num_files, num_bytes, tuple(notes), settings.start_as)  # fmt: skip


def do_bootstrap(plan: Bootstrap) -> None:
    """Make what `plan_bootstrap` found missing; doing it twice, or after a crash in the middle, changes nothing more."""
    make_folder(plan.folder)
    if plan.link:
        path = os.path.join(plan.folder, plan.link)
        if plan.renamed_from:
            os.rename(os.path.join(plan.folder, plan.renamed_from), path)
        elif plan.target is not None and plan.way != "symlink":
            try:
                bring(plan.start, path, plan.way)
            except OSError as error:
                hint = "; `as: symlink` and `as: copy` can" if error.errno == errno.EXDEV else ""
                raise StartProblem("cannot {} `{}` to `{}`: {}{}".format(
                    plan.way, plan.start, path, error.strerror, hint)) from error  # fmt: skip
        elif plan.target is not None:
            try:
                os.symlink(plan.target, path)
            except FileExistsError:
                if os.path.realpath(path) != os.path.realpath(plan.start):
                    raise
        sync_folder(plan.folder)
    if plan.tracker and plan.tracker_text is not None:
        write_tracker(plan.folder, plan.tracker, plan.tracker_text)


def write_tracker(folder: str, tracker: str, text: str) -> bool:
    """Let the tracker say `text`, exactly; False when it did already."""
    path = os.path.join(folder, tracker)
    try:
        if not os.path.islink(path):
            with open(path, "rb") as stream:
                if stream.read(4096) == text.encode("utf-8"):
                    return False
    except FileNotFoundError:
        pass
    write_atomic(path, text)
    return True


def _verified(settings: Settings, start: str) -> Tuple[int, int]:
    layout, expected = LAYOUTS[settings.layout], settings.expected
    if not layout.same_ranks:
        expected = expected._replace(data_parallel=None, zero_stage=None)
    verdict = layout.verdict(start, Listing(), expected)
    problems = list(verdict.faults) + list(verdict.mismatches)
    problems += ["it has no `{}`".format(name) for name in settings.start_needs
                 if not os.path.exists(os.path.join(start, name))]  # fmt: skip
    if problems:
        raise StartProblem("the start checkpoint `{}` is not complete: {}".format(start, "; ".join(problems)))
    return verdict.num_files, verdict.num_bytes


def _present_link(survey: Survey, start: str, link: str) -> Optional[str]:
    """The other name under which the folder links to the start already; StartProblem when `link` is something else."""
    path = survey.path(link)
    if os.path.islink(path):
        if os.path.realpath(path) != os.path.realpath(start):
            raise StartProblem("`{}` links to `{}`, not to the start checkpoint `{}`; remove the link or use another "
                               "checkpoint folder".format(path, os.readlink(path), start))  # fmt: skip
        return None
    for found in survey.candidates:
        if (
            found.is_link
            and found.name != link
            and os.path.realpath(survey.path(found.name)) == os.path.realpath(start)
        ):
            return found.name
    return None


def _relative(start: str, folder: str) -> str:
    """A relative way from the folder to the start that works: as the two were named, else between their real places.

    As they were named first: inside a container the same names are bound, their real places may not be.
    """
    for left, right in ((start, folder), (os.path.realpath(start), os.path.realpath(folder))):
        way = os.path.relpath(left, right)
        if os.path.realpath(os.path.join(os.path.realpath(folder), way)) == os.path.realpath(start):
            return way
    return os.path.realpath(start)
