"""The checkpoint folder, from the login node: what is in it, is it whole, bring a start in, go back. Same code as the guard's."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import EnvironmentFault, Problem, Refused, UsageError
from hpctrain.runtime.bootstrap import Bootstrap, StartProblem, do_bootstrap, plan_bootstrap, write_tracker
from hpctrain.runtime.files import Listing, free_name, sync_folder
from hpctrain.runtime.layout import Expected, Verdict
from hpctrain.runtime.layouts import LAYOUTS
from hpctrain.runtime.lock import Lock, state_of, this_holder
from hpctrain.runtime.settings import GuardError, Settings, parse_settings, read_settings
from hpctrain.runtime.survey import Candidate, Survey, choose


@dataclass(frozen=True)
class Row:
    """One checkpoint of a folder. `kind` is `made`, `start` or `link`; `faults` is None where it was not verified."""

    name: str
    number: int
    kind: str
    faults: tuple[str, ...] | None
    mismatches: tuple[str, ...]
    num_files: int
    num_bytes: int
    named: bool  # by the tracker
    chosen: bool  # a link that starts now would start from it


@dataclass(frozen=True)
class Use:
    """Going back: which checkpoint the next link will start from, and what is renamed so that it does."""

    folder: str
    name: str
    kind: str
    asides: tuple[tuple[str, str], ...]
    tracker: str | None
    tracker_text: str | None


def settings_of(
    target: str, layout: str | None = None, start: str | None = None, expected: Expected | None = None
) -> Settings:
    """What is known of the checkpoints of `target`: a run directory, a run.yaml, or a plain folder with its layout.

    `layout` may be left out for a plain folder where the names in it leave no doubt. Raises UsageError.
    """
    if os.path.isfile(os.path.join(target, "plan.json")):
        try:
            found = read_settings(os.path.abspath(target))
        except GuardError as error:
            raise UsageError(str(error)) from error
    elif os.path.isfile(target):
        from hpctrain.plan.load import load_plan

        found = parse_settings(load_plan(target).plan.guard())
    else:
        return _plain_settings(target, layout, start, expected)
    if layout and layout != found.layout:
        raise UsageError(
            f"`{target}` keeps checkpoints in layout `{found.layout}`, not `{layout}`", hint="leave --layout out"
        )
    if start:
        found = found._replace(start=os.path.abspath(start))
    if not found.checkpoint_dir:
        raise UsageError(
            f"run `{found.run}` has no checkpoint folder", where=target, hint="set `checkpoint: {dir: …}` in run.yaml"
        )
    return found


def _plain_settings(target: str, layout: str | None, start: str | None, expected: Expected | None) -> Settings:
    if target.endswith((".yaml", ".yml")) and not os.path.isdir(target):
        raise UsageError(f"there is no `{target}`", hint="name a run directory, a run.yaml or a checkpoint folder")
    if layout is None and os.path.isdir(target):
        fitting = [
            name
            for name, rules in LAYOUTS.items()
            if any(rules.number(entry) is not None for entry in os.listdir(target))
        ]
        if "deepspeed" in fitting and "dcp" in fitting:
            fitting.remove("dcp")  # `global_stepN` is DeepSpeed's name
        layout = fitting[0] if len(fitting) == 1 else None
    if layout is None and start:
        layout = layout_of_name(start)
    if layout is None or layout not in LAYOUTS:
        what = (
            f"`{layout}` is not a layout" if layout else f"`{target}` does not show in which layout its checkpoints are"
        )
        raise UsageError(what, hint=f"name one with --layout: {', '.join(sorted(LAYOUTS))}")
    return Settings(
        "", layout, os.path.abspath(target), os.path.abspath(start) if start else None, expected or Expected(), None, 3, None, True,
        # Nothing is known of what the run will reach, and the seed's folders use the framework's own name for the link.
        "greatest_folder" if layout == "deepspeed" else "latest",
    )  # fmt: skip


def list_checkpoints(settings: Settings, verify: bool = True) -> tuple[list[Row], list[str], Survey]:
    """The checkpoints of the folder in the framework's order, and the names of what was moved aside; reads only.

    Raises EnvironmentFault when the folder is not there.
    """
    survey = _survey(settings)
    chosen = choose(survey).name if verify else None
    rows = []
    for found in survey.candidates:
        verdict = survey.verdict(found.name) if verify else Verdict((), (), 0, 0)
        rows.append(
            Row(found.name, found.number, _kind(found), verdict.faults if verify else None, verdict.mismatches,
                verdict.num_files, verdict.num_bytes, found.name == survey.named, found.name == chosen)
        )  # fmt: skip
    asides = sorted(name for name in survey.others if name.startswith(("interrupted-", "aside-")))
    return rows, asides, survey


def verify(target: str, layout: str | None, expected: Expected) -> list[tuple[str, Verdict]]:
    """The verdict on one checkpoint, or on each of a run's or of a folder's. Raises UsageError for an unknown layout."""
    path = os.path.normpath(target)
    a_run = os.path.isfile(path) or os.path.isfile(os.path.join(path, "plan.json"))
    if not a_run and not os.path.isdir(path):
        raise EnvironmentFault(f"there is no folder `{path}`")
    if a_run or _holds_checkpoints(path, layout):
        rows, _, survey = list_checkpoints(settings_of(target, layout, expected=expected))
        return [(survey.path(row.name), survey.verdict(row.name)) for row in rows]
    return [(path, LAYOUTS[layout or layout_of_name(path)].verdict(path, Listing(), expected))]


def _holds_checkpoints(path: str, layout: str | None) -> bool:
    """Whether a folder is one of checkpoints rather than a checkpoint itself."""
    kinds = [LAYOUTS[layout]] if layout else list(LAYOUTS.values())
    if any(kind.number(os.path.basename(os.path.abspath(path))) is not None for kind in kinds):
        return False
    return any(kind.number(name) is not None for kind in kinds for name in os.listdir(path))


def layout_of_name(path: str) -> str:
    """The layout whose checkpoints have names like this folder's. Raises UsageError when that is not exactly one."""
    name = os.path.basename(os.path.abspath(path))
    fitting = [layout for layout, rules in LAYOUTS.items() if rules.number(name) is not None and layout != "dcp"]
    fitting = fitting or [layout for layout in ("dcp",) if LAYOUTS[layout].number(name) is not None]
    if len(fitting) != 1:
        raise UsageError(
            f"`{name}` does not show in which layout it is",
            hint=f"name one with --layout: {', '.join(sorted(LAYOUTS))}",
        )
    return fitting[0]


def bootstrap(settings: Settings, dry_run: bool = False, ranks: Expected | None = None) -> Bootstrap:
    """Bring the start checkpoint into the folder: a relative link and the tracker, after the start was verified.

    Does nothing when that was done before. Raises UsageError when the start cannot be used or was not saved by exactly
    `ranks`, where they are given; Refused when the folder holds checkpoints of a later training already. Writes nothing
    with `dry_run`.
    """
    if not settings.start:
        raise UsageError(
            "there is no start checkpoint to bootstrap from", hint="set `checkpoint: {start: …}`, or give --start"
        )
    survey = Survey(settings)
    if survey.made:
        newest = survey.made[-1]
        raise Refused(
            Problem(
                f"`{settings.checkpoint_dir}` already holds newer work: {len(survey.made)} checkpoints up to `{newest.name}`",
                why=f"pointing `{survey.layout.tracker or 'the framework'}` back at the start would throw it away",
                hint="`hpctrain checkpoint use --to start` goes back to the start and keeps the others aside",
            )
        )
    try:
        plan = plan_bootstrap(settings, survey)
        if ranks and any(number is not None for number in ranks):
            other = survey.layout.verdict(settings.start, Listing(), ranks).mismatches
            if other:
                raise StartProblem(f"the start checkpoint `{settings.start}` {'; '.join(other)}")
    except StartProblem as problem:
        raise UsageError(str(problem), hint="give another `checkpoint.start`, or finish copying it") from problem
    if not dry_run:
        try:
            do_bootstrap(plan)
        except StartProblem as problem:
            raise UsageError(str(problem)) from problem
        except OSError as error:
            raise EnvironmentFault(f"cannot write into `{plan.folder}`: {error.strerror}") from error
    return plan


def plan_use(settings: Settings, to: str | None = None, back: int | None = None) -> Use:
    """Decide how to go back to checkpoint `to` (a name, a number, or `start`) or by `back` complete checkpoints.

    Raises UsageError when there is no such complete checkpoint.
    """
    survey = _survey(settings)
    choice = choose(survey)
    found = _named(survey, to) if to is not None else _back(survey, choice.name, back or 1)
    faults = survey.verdict(found.name).faults
    if faults:
        raise UsageError(f"`{found.name}` is not complete: {faults[0]}", hint="see `hpctrain checkpoint list`")
    newer = [
        made
        for made in survey.made
        if found.is_start or found.is_link or survey.layout.order(made.name) > survey.layout.order(found.name)
    ]
    asides = []
    for made in newer:
        word = "aside" if survey.complete(made.name) else "interrupted"
        asides.append((made.name, f"{word}-{made.number}"))
    text = survey.layout.tracker_text(found.name) if survey.layout.tracker else None
    return Use(survey.folder, found.name, _kind(found), tuple(asides), survey.layout.tracker, text)


def do_use(settings: Settings, use: Use) -> None:
    """Go back. The tracker first: whatever is cut off after that, the next link does the rest as it starts.

    Raises Refused while a link works in the folder.
    """
    holder = Lock(use.folder, this_holder(settings.run, os.environ)).holder()
    if holder and state_of(holder) != "dead":
        raise Refused(
            f"job {holder.job_id or holder.pid} works in `{use.folder}` now, or may",
            hint="stop the chain first: `hpctrain stop`, or `hpctrain cancel`",
        )
    try:
        if use.tracker and use.tracker_text is not None:
            write_tracker(use.folder, use.tracker, use.tracker_text)
        for name, to in use.asides:
            os.rename(os.path.join(use.folder, name), os.path.join(use.folder, free_name(use.folder, to)))
        sync_folder(use.folder)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot change `{use.folder}`: {error.strerror}", hint="run the same command again"
        ) from error


def _survey(settings: Settings) -> Survey:
    if not os.path.isdir(settings.checkpoint_dir or ""):
        raise EnvironmentFault(
            f"there is no folder `{settings.checkpoint_dir}`", hint="no link has run yet, or it is on another machine"
        )
    return Survey(settings)


def _kind(found: Candidate) -> str:
    return "start" if found.is_start else "link" if found.is_link else "made"


def _named(survey: Survey, to: str) -> Candidate:
    for found in survey.candidates:
        if to in (found.name, str(found.number)) and not (to.isdigit() and found.is_start):
            return found
        if to == "start" and found.is_start:
            return found
    names = ", ".join(found.name for found in survey.candidates[-5:])
    raise UsageError(
        f"there is no checkpoint `{to}` in `{survey.folder}`", hint=f"there are: {names}" if names else "it holds none"
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
        f"there are not {back} complete checkpoints before `{current}`"
        if current
        else "there is no complete checkpoint",
        hint="see `hpctrain checkpoint list`; `--to start` goes back to the start",
    )


def as_json(row: Row) -> dict[str, object]:
    """A row for `--json`."""
    return {
        "name": row.name, "number": row.number, "kind": row.kind, "complete": None if row.faults is None else not row.faults,
        "faults": list(row.faults or ()), "mismatches": list(row.mismatches), "num_files": row.num_files,
        "num_bytes": row.num_bytes, "named": row.named, "chosen": row.chosen,
    }  # fmt: skip


def read_plan(run_dir: str) -> dict[str, Any]:
    """The whole plan.json of a run directory. Raises UsageError when it is none."""
    try:
        with open(os.path.join(run_dir, "plan.json"), encoding="utf-8") as file:
            found = json.load(file)
        return {"guard": found["guard"], "job": found["job"], "cost": found["cost"], **found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"its plan.json has no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"`{run_dir}` is no run directory: {why}", hint="`hpctrain render` makes one") from error
