"""The checkpoint folder, from the login node: what is in it, is it whole, bring a start in, go
back. Same code as the guard's."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import EnvironmentFault, Problem, Refused, UsageError
from hpctrain.runtime import sidecar
from hpctrain.runtime.bootstrap import (
    Bootstrap,
    StartProblem,
    do_bootstrap,
    plan_bootstrap,
    write_tracker,
)
from hpctrain.runtime.files import MAX_RECORD_BYTES, Listing, is_folder, read_limited, sync_folder
from hpctrain.runtime.huggingface import Weights
from hpctrain.runtime.layout import COMPLETE, TORN, UNREADABLE, Expected, Verdict
from hpctrain.runtime.layouts import LAYOUTS, OwnRule, judge_as, resembling
from hpctrain.runtime.link import now
from hpctrain.runtime.lock import Lock, this_holder
from hpctrain.runtime.settings import GuardError, Settings, parse_settings, read_settings
from hpctrain.runtime.survey import Candidate, Survey, choose, start_number

MODEL_ALONE = Weights.name


@dataclass(frozen=True)
class Row:
    """One checkpoint of a folder. `kind` is `made`, `start` or `link`; `verdict` is None where it
    was not looked into."""

    name: str
    number: int | None
    kind: str
    verdict: Verdict | None
    named: bool  # by the tracker
    chosen: bool  # a link that starts now would start from it


@dataclass(frozen=True)
class Contents:
    """What a checkpoint folder holds: its checkpoints, what was set aside (name: path), and why no
    link would start."""

    rows: tuple[Row, ...]
    asides: Mapping[str, str]
    survey: Survey
    refusal: str


@dataclass(frozen=True)
class Use:
    """Going back: which checkpoint the next link will start from, what is set aside so that it
    does, and from where it is brought back where it was set aside before."""

    folder: str
    place: str
    name: str
    kind: str
    asides: tuple[tuple[str, str], ...]
    tracker: str | None
    tracker_text: str | None
    brought_from: str | None = None


def settings_of(
    target: str,
    layout: str | None = None,
    start: str | None = None,
    expected: Expected | None = None,
) -> Settings:
    """What is known of the checkpoints of `target`: a run directory, a run.yaml, or a plain folder
    with its layout.

    `layout` may be left out for a plain folder where the names in it leave no doubt. Raises
    UsageError.
    """
    if os.path.isfile(os.path.join(target, "plan.json")):
        try:
            found = read_settings(os.path.abspath(target))
        except GuardError as error:
            raise UsageError(str(error)) from error
    elif os.path.isfile(target):
        from hpctrain.plan.load import load_plan

        plan = load_plan(target).plan
        found = parse_settings(plan.guard())._replace(run_dir=plan.run_dir)
    else:
        return _plain_settings(target, layout, start, expected)
    if layout and layout != found.layout:
        raise UsageError(
            f"`{target}` keeps checkpoints in layout `{found.layout}`, not `{layout}`",
            hint="leave --layout out",
        )
    if start:
        found = found._replace(start=os.path.abspath(start))
    if not found.checkpoint_dir:
        raise UsageError(
            f"run `{found.run}` has no checkpoint folder",
            where=target,
            hint="set `checkpoint: {dir: …}` in run.yaml",
        )
    return found


def _plain_settings(
    target: str, layout: str | None, start: str | None, expected: Expected | None
) -> Settings:
    if target.endswith((".yaml", ".yml")) and not os.path.isdir(target):
        raise UsageError(
            f"there is no `{target}`",
            hint="name a run directory, a run.yaml or a checkpoint folder",
        )
    own = None
    if layout is None and os.path.isdir(target):
        layout = layout_of_folder(target)
    if layout is None and start:
        layout = layout_of_name(start)
    if layout is None and os.path.isdir(target):
        # Odd names: whatever has a number in its name and a writer's files in it.
        layout, own = "own", OwnRule("*{iteration}*")
    if own is None and (layout is None or layout not in LAYOUTS):
        what = f"`{layout}` is not a layout"
        if layout is None:
            what = f"`{target}` does not show in which layout its checkpoints are"
        raise UsageError(what, hint=f"name one with --layout: {', '.join(sorted(LAYOUTS))}")
    return Settings(
        run="",
        layout=str(layout),
        checkpoint_dir=os.path.abspath(target),
        start=os.path.abspath(start) if start else None,
        expected=expected or Expected(),
        target=None,
        give_up_after=3,
        after_each=None,
        quarantine=True,
        # Nothing is known of what the run will reach, and the seed's folders use the framework's
        # own name for the link.
        counter="greatest_folder" if layout == "deepspeed" else "latest",
        own=own,
    )


def layout_of_folder(folder: str) -> str | None:
    """The layout of the checkpoints in a folder, told by their files first and their names then;
    None where neither does."""
    listing = Listing()
    forms: dict[str, str] = {}
    for name, entry in _entries(listing, folder).items():
        if resembling({name: ""}):
            try:
                verdict = judge_as(None, entry.path, listing, Expected())
            except (FileNotFoundError, NotADirectoryError):
                continue
            forms[name] = verdict.form
    fitting = resembling(forms)
    return fitting[0] if fitting else None


def _entries(listing: Listing, folder: str) -> dict[str, os.DirEntry[str]]:
    try:
        return dict(listing.entries(folder))
    except OSError as error:
        raise EnvironmentFault(f"`{folder}` cannot be read: {error.strerror}") from error


def list_checkpoints(settings: Settings, verify: bool = True) -> Contents:
    """The checkpoints of the folder in the framework's order, and what was set aside; reads only.

    Raises EnvironmentFault when the folder is not there or cannot be read.
    """
    survey = survey_of(settings)
    choice = choose(survey) if verify else None
    rows = tuple(
        Row(
            found.name,
            found.number,
            _kind(found),
            survey.verdict(found.name) if verify else None,
            found.name == survey.named,
            choice is not None and not choice.refusal and found.name == choice.name,
        )
        for found in survey.candidates
    )
    refusal = (choice.refusal or choice.unreadable) if choice else ""
    return Contents(rows, sidecar.kept_aside(survey.folder, survey.place), survey, refusal)


def verify(target: str, layout: str | None, expected: Expected) -> list[tuple[str, Verdict]]:
    """The verdict on one checkpoint, or on each of a run's or of a folder's, whatever their names.

    An empty answer means that there is no checkpoint. Raises UsageError for an invalid run and an
    unknown layout, EnvironmentFault when there is nothing or it cannot be read.
    """
    path = os.path.normpath(target)
    if os.path.isfile(os.path.join(path, "plan.json")) or path.endswith((".yaml", ".yml")):
        contents = list_checkpoints(settings_of(target, layout, expected=expected))
        survey = contents.survey
        return [(survey.path(row.name), survey.verdict(row.name)) for row in contents.rows]
    if not os.path.exists(path):
        raise EnvironmentFault(f"there is no `{path}`")
    rules = LAYOUTS[layout] if layout else None
    itself = judge_as(rules, os.path.abspath(path), Listing(), expected)
    if itself.form not in ("", MODEL_ALONE) or not os.path.isdir(path):
        return [(path, itself)]
    inside = _inside(path, layout, expected)
    if inside:
        return inside
    by_name = bool(resembling({os.path.basename(os.path.abspath(path)): ""}))
    return [(path, itself)] if by_name or itself.form or itself.state == UNREADABLE else []


def _inside(folder: str, layout: str | None, expected: Expected) -> list[tuple[str, Verdict]]:
    """The verdicts on the checkpoints in a folder: those with a layout's names, else any with a
    writer's files."""
    listing = Listing()
    entries = _entries(listing, folder)
    rules = [LAYOUTS[layout]] if layout else list(LAYOUTS.values())
    named = {name for name in entries if any(one.names(name) for one in rules)}
    found: list[tuple[str, Verdict]] = []
    before: dict[str, str] = {}  # the last checkpoint of each form, beside which the next is judged
    for name in sorted(entries, key=lambda name: (start_number(name) or 0, name)):
        if not is_folder(entries[name]) and not (name in named and name.endswith(".ckpt")):
            continue
        one = LAYOUTS[layout] if layout else None
        verdict = judge_as(one, entries[name].path, listing, expected)
        if verdict.form in before:
            verdict = judge_as(one, entries[name].path, listing, expected, before[verdict.form])
        before[verdict.form] = entries[name].path
        if verdict.form or name in named:
            found.append((os.path.join(folder, name), verdict))
    return found


def layout_of_name(path: str) -> str:
    """The layout of the checkpoint at `path`, told by its files, else by its name. Raises
    UsageError when neither does."""
    name = os.path.basename(os.path.abspath(path))
    form = ""
    if os.path.isdir(path):
        form = judge_as(None, os.path.abspath(path), Listing(), Expected()).form
    writing = [
        rules.name for rules in LAYOUTS.values() if form in {one.name for one in rules.forms}
    ]
    fitting = [one for one in resembling({name: form}) if not writing or one in writing] or writing
    if not fitting:
        raise UsageError(
            f"`{name}` does not show in which layout it is",
            hint=f"name one with --layout: {', '.join(sorted(LAYOUTS))}",
        )
    return fitting[0]


def bootstrap(
    settings: Settings, dry_run: bool = False, ranks: Expected | None = None
) -> Bootstrap:
    """Bring the start checkpoint into the folder: a relative link and the tracker, after the start
    was verified.

    Does nothing when that was done before. Raises UsageError when the start cannot be used or was
    not saved by exactly `ranks`, where they are given; Refused when the folder holds checkpoints of
    a later training already. Writes nothing with `dry_run`.
    """
    if not settings.start:
        raise UsageError(
            "there is no start checkpoint to bootstrap from",
            hint="set `checkpoint: {start: …}`, or give --start",
        )
    survey = Survey(settings)
    if survey.made:
        newest = survey.made[-1]
        raise Refused(
            Problem(
                f"`{settings.checkpoint_dir}` already holds newer work: {len(survey.made)}"
                f" checkpoints up to `{newest.name}`",
                why=(
                    f"pointing `{survey.layout.tracker or 'the framework'}` back at the start would"
                    " throw it away"
                ),
                hint=(
                    "`hpctrain checkpoint use --to start` goes back to the start and keeps the"
                    " others aside"
                ),
            )
        )
    try:
        plan = plan_bootstrap(settings, survey)
        if ranks and any(number is not None for number in ranks):
            other = survey.layout.verdict(settings.start, Listing(), ranks).mismatches
            if other:
                raise StartProblem(f"the start checkpoint `{settings.start}` {'; '.join(other)}")
    except StartProblem as problem:
        raise UsageError(
            str(problem), hint="give another `checkpoint.start`, or finish copying it"
        ) from problem
    if not dry_run:
        try:
            do_bootstrap(plan)
        except StartProblem as problem:
            raise UsageError(str(problem)) from problem
        except OSError as error:
            raise EnvironmentFault(
                f"cannot write into `{plan.folder}`: {error.strerror}"
            ) from error
    return plan


def plan_use(settings: Settings, to: str | None = None, back: int | None = None) -> Use:
    """Decide how to go back to checkpoint `to` (a name, a number, or `start`) or by `back` complete
    checkpoints.

    Raises UsageError when there is no such complete checkpoint.
    """
    survey = survey_of(settings)
    kept = sidecar.kept_aside(survey.folder, survey.place)
    if to is not None and to in kept and to not in [found.name for found in survey.candidates]:
        return _plan_return(survey, to, kept[to])
    choice = choose(survey)
    found = _named(survey, to) if to is not None else _back(survey, choice.name, back or 1)
    _require_complete(found.name, survey.verdict(found.name))
    return _use_of(survey, found, found.name, None)


def _plan_return(survey: Survey, aside: str, path: str) -> Use:
    """Bring back a checkpoint that was set aside, and start from it."""
    name = sidecar.original_name(aside)
    if os.path.lexists(survey.path(name)):
        raise UsageError(
            f"`{name}` is in `{survey.folder}` again, beside `{aside}`", hint=f"--to {name}"
        )
    _require_complete(aside, judge_as(survey.layout, path, Listing(), survey.settings.expected))
    found = Candidate(name, survey.layout.number(name), False, False)
    return _use_of(survey, found, name, path)


def _require_complete(name: str, verdict: Verdict) -> None:
    if verdict.state == UNREADABLE:
        raise EnvironmentFault(f"`{name}`: {verdict.reason}")
    if verdict.state != COMPLETE:
        words = "is not complete" if verdict.state == TORN else "cannot be told to be complete"
        raise UsageError(
            f"`{name}` {words}: {verdict.faults[0]}", hint="see `hpctrain checkpoint list`"
        )


def _use_of(survey: Survey, found: Candidate, name: str, brought_from: str | None) -> Use:
    from_start = found.is_start or found.is_link
    newer = [made for made in survey.made if from_start or survey.order(made) > survey.order(found)]
    asides = []
    for made in newer:
        torn = survey.verdict(made.name).state == TORN
        asides.append((made.name, "interrupted-" if torn else "aside-"))
    text = survey.layout.tracker_text(name) if survey.layout.tracker else None
    return Use(
        survey.folder,
        survey.place,
        name,
        _kind(found),
        tuple(asides),
        survey.layout.tracker,
        text,
        brought_from,
    )


def do_use(settings: Settings, use: Use) -> list[tuple[str, str]]:
    """Go back; returns what was set aside, and where it is now.

    The decision is recorded first, then the tracker: whatever is cut off after that, the next link
    does the rest as it starts. Raises Refused while a link works in the folder.
    """
    moved = []
    try:
        place = sidecar.make_place(use.folder, settings.run_dir, lambda text: None)
        with _locked(place, settings, use.folder):
            act = {"event": "use", "to": use.name, "kind": use.kind, "time": now()}
            sidecar.note_act(place, act)
            if use.brought_from:
                os.rename(use.brought_from, os.path.join(use.folder, use.name))
            if use.tracker and use.tracker_text is not None:
                write_tracker(use.folder, use.tracker, use.tracker_text)
            for name, kind in use.asides:
                moved.append((name, sidecar.set_aside(use.folder, place, name, kind)))
            sync_folder(use.folder)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot change `{use.folder}`: {error.strerror}", hint="run the same command again"
        ) from error
    return moved


@contextlib.contextmanager
def _locked(place: str, settings: Settings, folder: str) -> Iterator[None]:
    """No link begins meanwhile. Raises Refused, at once, where one works in the folder."""
    at_once = {"HPCTRAIN_LOCK_WAIT_S": "0"}
    lock = Lock(place, this_holder(settings.run, os.environ), environ=at_once, older=folder)
    try:
        lock.acquire()
    except GuardError as error:
        holder = lock.holder()
        who = f"job {holder.job_id or holder.pid}" if holder else "another job"
        raise Refused(
            f"{who} works in `{folder}` now, or may",
            hint="stop the chain first: `hpctrain stop`, or `hpctrain cancel`",
        ) from error
    try:
        yield
    finally:
        lock.release()


def survey_of(settings: Settings) -> Survey:
    """What is in the checkpoint folder. Raises EnvironmentFault when it is not there or cannot be
    read."""
    if not os.path.isdir(settings.checkpoint_dir or ""):
        raise EnvironmentFault(
            f"there is no folder `{settings.checkpoint_dir}`",
            hint="no link has run yet, or it is on another machine",
        )
    try:
        return Survey(settings)
    except OSError as error:
        raise EnvironmentFault(f"`{error.filename}` cannot be read: {error.strerror}") from error


def _kind(found: Candidate) -> str:
    if found.is_start:
        return "start"
    return "link" if found.is_link else "made"


def _named(survey: Survey, to: str) -> Candidate:
    for found in survey.candidates:
        if to in (found.name, str(found.number)) and not (to.isdigit() and found.is_start):
            return found
        if to == "start" and found.is_start:
            return found
    names = ", ".join(found.name for found in survey.candidates[-5:])
    raise UsageError(
        f"there is no checkpoint `{to}` in `{survey.folder}`",
        hint=f"there are: {names}" if names else "it holds none",
    )


def _back(survey: Survey, current: str | None, back: int) -> Candidate:
    complete = []
    past = False
    for found in reversed(survey.made):
        past = past or found.name == current
        if past and survey.complete(found.name):
            complete.append(found)
        if len(complete) > back:
            return complete[back]
    raise UsageError(
        (
            f"there are not {back} complete checkpoints before `{current}`"
            if current
            else "there is no complete checkpoint"
        ),
        hint="see `hpctrain checkpoint list`; `--to start` goes back to the start",
    )


def as_json(row: Row) -> dict[str, object]:
    """A row for `--json`."""
    verdict = row.verdict
    return {
        "name": row.name,
        "number": row.number,
        "kind": row.kind,
        "complete": None if verdict is None else verdict.state == COMPLETE,
        **verdict_json(verdict or Verdict((), (), 0, 0, "")),
        "named": row.named,
        "chosen": row.chosen,
    }


def verdict_json(verdict: Verdict) -> dict[str, object]:
    """A verdict for `--json`."""
    return {
        "state": verdict.state or None,
        "form": verdict.form or None,
        "faults": list(verdict.faults),
        "mismatches": list(verdict.mismatches),
        "num_files": verdict.num_files,
        "num_bytes": verdict.num_bytes,
    }


def read_plan(run_dir: str) -> dict[str, Any]:
    """The whole plan.json of a run directory. Raises UsageError when it is none."""
    try:
        found = json.loads(read_limited(os.path.join(run_dir, "plan.json"), MAX_RECORD_BYTES))
        return {"guard": found["guard"], "job": found["job"], "cost": found["cost"], **found}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"its plan.json has no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(
            f"`{run_dir}` is no run directory: {why}", hint="`hpctrain render` makes one"
        ) from error
