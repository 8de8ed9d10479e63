"""What the guard would say of the run's checkpoints if a link began now: told before anything is
queued."""

from __future__ import annotations

import os
from collections.abc import Iterator

from hpctrain.base.errors import Problem
from hpctrain.plan.make import Plan
from hpctrain.runtime import handover
from hpctrain.runtime.bootstrap import StartProblem, plan_bootstrap
from hpctrain.runtime.files import OddFile, read_records
from hpctrain.runtime.link import decide_now
from hpctrain.runtime.settings import Settings, parse_settings
from hpctrain.runtime.survey import Choice, Survey, choose


def checkpoint_problems(plan: Plan) -> Iterator[Problem]:
    """Why a link would refuse the checkpoint folder or the start, by the guard's own rules; reads
    only.

    What cannot be read from here is a warning, since it is no verdict on the run.
    """
    where = plan.spec.where("checkpoint", "dir")
    if not plan.spec.checkpoint_dir:
        return  # where the recipe needs one, that is said elsewhere
    try:
        settings = parse_settings(plan.guard())._replace(run_dir=plan.run_dir)
        if settings.layout == "none" or not settings.checkpoint_dir:
            return
        survey = Survey(settings)
        choice = choose(survey)
        yield from _folder_problems(plan, settings, survey, choice)
        if choice.kind == "start" and settings.start and os.path.isdir(settings.start):
            plan_bootstrap(settings, survey)
        refused = handover.refusal(settings) if choice.kind == "nothing" else ""
        if refused:
            yield Problem(refused, plan.spec.where("checkpoint", "start"))
    except StartProblem as problem:
        yield Problem(str(problem), plan.spec.where("checkpoint", "start"))
    except OSError as error:
        what = f"`{error.filename}` cannot be read: {error.strerror}"
        why = "nothing can be said of the checkpoints there; a link would not start"
        yield Problem(what, where, why, level="warning")


def _folder_problems(
    plan: Plan, settings: Settings, survey: Survey, choice: Choice
) -> Iterator[Problem]:
    where = plan.spec.where("checkpoint", "dir")
    if choice.unreadable:
        why = "nothing can be said of it; a link would not start"
        yield Problem(choice.unreadable, where, why, level="warning")
        return
    try:
        links = read_records(os.path.join(plan.run_dir, "links.jsonl"))
    except OddFile:
        links = []
    decided = decide_now(settings, choice, links)
    if decided.decision == "gave_up":
        yield Problem(decided.reason, where, "a link would give up (93)")
    elif decided.decision == "run" and choice.kind == "made" and choice.name:
        verdict = survey.verdict(choice.name)
        for mismatch in verdict.mismatches:
            level = "error" if mismatch in verdict.refusals else "warning"
            yield Problem(f"`{choice.name}` {mismatch}", where, level=level)
