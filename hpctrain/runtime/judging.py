"""One checkpoint judged by its files: what wrote it, and whether it can be proven whole or torn."""

import errno
import os
import re
from typing import Optional, Tuple

from .dcp import Dcp
from .deepspeed import DeepSpeed
from .files import FileInfo, Listing
from .huggingface import Accelerate, Completed, HfTrainer, Weights
from .layout import (
    COMPLETE,
    TORN,
    UNKNOWN,
    UNREADABLE,
    Expected,
    Folder,
    Form,
    Layout,
    Report,
    Verdict,
    shape_of,
)
from .megatron import MegatronDist, MegatronLegacy
from .writers import LightningFolder, Nanotron, OlmoCore, SingleFile, Verl

# Those whose marks are surest first: what a checkpoint is, is told by its files.
FORMS: Tuple[Form, ...] = (
    OlmoCore(),
    Verl(),
    MegatronLegacy(),
    MegatronDist(),
    HfTrainer(),
    Completed(),
    Accelerate(),
    LightningFolder(),
    Nanotron(),
    DeepSpeed(),
    Dcp(),
    Weights(),
)
ABSENT = (errno.ENOENT, errno.ENOTDIR)


def judge_path(path: str, expected: Optional[Expected] = None) -> Tuple[str, Verdict]:
    """What is at `path`, told by its files alone: the writer's form and the verdict on it.

    Another checkpoint beside it bears witness to what the program writes. Raises FileNotFoundError
    when there is nothing."""
    path = os.path.abspath(path)
    verdict = judge_as(None, path, Listing(), expected or Expected(), witness_of(path))
    return verdict.form, verdict


def witness_of(path: str) -> Optional[str]:
    """The checkpoint beside the one at `path`, named like it but for its number: the one before it,
    else the next."""
    parent, name = os.path.split(path)
    try:
        names = [other for other in os.listdir(parent) if shape_of(other) == shape_of(name)]
    except OSError:
        return None
    numbers = sorted((_numbers_in(other), other) for other in names)
    before = [other for number, other in numbers if number < _numbers_in(name)]
    after = [other for number, other in numbers if number > _numbers_in(name)]
    chosen = before[-1:] or after[:1]
    return os.path.join(parent, chosen[0]) if chosen and re.search(r"\d", name) else None


def _numbers_in(name: str) -> Tuple[int, ...]:
    return tuple(int(text) for text in re.findall(r"\d{1,18}", name))


def judge_as(
    layout: Optional[Layout],
    path: str,
    listing: Listing,
    expected: Expected,
    previous: Optional[str] = None,
) -> Verdict:
    """The verdict on a checkpoint that is said to be of `layout` (None: of any). See
    Layout.verdict."""
    try:
        folder = _folder_at(path, listing, previous)
        form = form_of(layout, folder)
        report = Report()
        if form is not None:
            form.judge(folder, expected, report)
    except OSError as error:
        if error.errno in ABSENT and not os.path.lexists(path):
            raise
        where = os.path.basename(str(error.filename or path))
        why = "`{}` cannot be read: {}".format(where, error.strerror or error)
        return Verdict((why,), (), 0, 0, UNREADABLE)
    if form is None:
        report = _no_rule(folder)
    sizes = [info.size for info in folder.files.values() if info.size > 0]
    return Verdict(
        tuple(report.torn or report.unknown),
        tuple(report.mismatches),
        len(folder.files),
        sum(sizes),
        _state(report),
        form.name if form else "",
        tuple(report.refusals),
        report.iteration,
    )


def _state(report: Report) -> str:
    if report.torn:
        return TORN
    return UNKNOWN if report.unknown else COMPLETE


def _folder_at(path: str, listing: Listing, previous: Optional[str]) -> Folder:
    """The checkpoint at `path`; one that is a single file is a folder of that file alone."""
    if os.path.isdir(path):
        return Folder.of(path, listing, previous)
    info = os.stat(path)
    name = os.path.basename(path)
    return Folder(os.path.dirname(path), {name: FileInfo(info.st_size, info.st_mtime_ns)})


def form_of(layout: Optional[Layout], folder: Folder) -> Optional[Form]:
    """The form that the files show: one of the layout's own, else any that recognises them, else
    one of the layout's whose save was cut off early. None when there is no rule for what lies
    there."""
    own = layout.forms if layout else ()
    for form in own:
        if form.recognises(folder):
            return form
    for form in FORMS:
        if form.recognises(folder):
            early = _cut_off_early(own, folder) if isinstance(form, Weights) else None
            return early or form
    for form in (*own, SingleFile()):
        if form.could_be(folder):
            return form
    return None


def _cut_off_early(own: Tuple[Form, ...], folder: Folder) -> Optional[Form]:
    """What was writing a folder that holds a model and nothing else yet: the layout's own form,
    else what the one beside it is."""
    before = Folder(folder.path, folder.previous)
    beside = [form for form in FORMS if not isinstance(form, Weights) and form.recognises(before)]
    return next((form for form in (*own, *beside) if form.could_be(folder)), None)


def _no_rule(folder: Folder) -> Report:
    report = Report()
    if not folder.files:
        report.torn.append("there is nothing in it")
    else:
        shown = ", ".join("`{}`".format(name) for name in sorted(folder.files)[:3])
        report.unknown.append("there is no rule for what lies in it ({})".format(shown))
    return report
