"""From the command line to a request, and from an outcome to what is printed."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpctrain.base import terminal
from hpctrain.base.errors import EnvironmentFault, Problem, Refused, UsageError
from hpctrain.base.units import format_time
from hpctrain.config.pipeline import is_pipeline
from hpctrain.jobs.ladder import decided, kept_batch
from hpctrain.jobs.pipeline.stages import Pipeline, load_pipeline
from hpctrain.plan.load import Loaded, load_plan
from hpctrain.plan.make import Plan
from hpctrain.recipes.memory import runs_out
from hpctrain.sandbox.rehearse import timeline
from hpctrain.sandbox.rehearse.play import FAULTS, Outcome, Request
from hpctrain.sandbox.rehearse.timeline import Bar


@dataclass(frozen=True)
class Wishes:
    """The options of the command line, as they were given."""

    nodes: int | None = None
    jobs: int | None = None
    faults: str | None = None
    accounts: Sequence[str] = ()
    accounting: bool = True
    no_check: bool = False
    job_script: str | None = None
    limits_only: bool = False
    speed: float | None = None
    keep: bool = False
    directory: str = ""
    picture: str | None = None


@dataclass(frozen=True)
class Wanted:
    """What to rehearse: one run, or with `pipeline` its stages in order; `requests` by stage, ""
    for a run alone."""

    plans: tuple[Plan, ...]
    requests: Mapping[str, Request]
    loaded: Loaded | None = None
    pipeline: Pipeline | None = None
    sources: tuple[str | None, ...] = (None,)


def prepare(
    run_yaml: str, assignments: Sequence[str], out_dir: str | None, wishes: Wishes
) -> Wanted:
    """The plans and the requests. Raises UsageError for an invalid run (unless `no_check` and it
    can be rendered) or option."""
    if wishes.picture and os.path.lexists(wishes.picture):
        raise Refused(
            "is there already, and is left as it is",
            where=wishes.picture,
            hint="name another file with --picture",
        )
    if is_pipeline(run_yaml):
        return _prepare_pipeline(run_yaml, assignments, out_dir, wishes)
    loaded = load_plan(run_yaml, assignments, out_dir)
    if wishes.nodes and not any(map(runs_out, loaded.plan.errors)):
        loaded = load_plan(run_yaml, [*assignments, *_on_nodes(loaded.plan, wishes)], out_dir)
    return Wanted(
        (loaded.plan,), {"": _request(loaded.plan, wishes, _faults(wishes.faults))}, loaded
    )


# On other nodes than the run's own nobody asks whether it fits: the rehearsal's GPUs are made up.
_FITS = "estimate.memory_gib=1"


def _on_nodes(plan: Plan, wishes: Wishes) -> list[str]:
    """The assignments for so many nodes: with a global batch in run.yaml the accumulation too, as
    the ladder has it, which is said."""
    assert wishes.nodes is not None
    words = [f"nodes={wishes.nodes}", _FITS]
    rules = plan.recipe.values["ladder"]
    batch = rules["global_batch"] and decided(plan, rules["global_batch"])
    if batch and wishes.nodes != plan.spec.num_nodes:
        kept = kept_batch(plan, wishes.nodes * plan.gpus_per_node)
        words += [f"{key}={value}" for key, value in kept.items()]
        told = ", ".join(f"{key}: {value}" for key, value in kept.items())
        terminal.info(f"note: {wishes.nodes} nodes keep the run's global batch with {told}")
    return words


def _prepare_pipeline(
    run_yaml: str, assignments: Sequence[str], out_dir: str | None, wishes: Wishes
) -> Wanted:
    if wishes.job_script:
        raise UsageError("--job is for one run, and this is a pipeline", where=run_yaml)
    pipeline = load_pipeline(run_yaml, assignments, out_dir)
    names = [planned.stage.name for planned in pipeline.stages]
    stage, chosen = _faults_of_stage(wishes.faults, names)
    of_each = (f"nodes={wishes.nodes}", _FITS) if wishes.nodes else ()
    more = [f"{name}.{words}" for name in names for words in of_each]
    for planned in pipeline.stages:
        name, given = planned.stage.name, planned.plan.spec.num_links
        jobs = wishes.jobs or (max(given, len(chosen) + 1) if name == stage else given)
        more += [f"{name}.chain.jobs={jobs}"] if jobs != given else []
    if more:
        pipeline = load_pipeline(run_yaml, [*assignments, *more], out_dir)
    plans = tuple(planned.plan for planned in pipeline.stages)
    sites = {plan.site.name for plan in plans}
    if len(sites) > 1:
        raise UsageError(
            f"the stages are for {len(sites)} sites ({', '.join(sorted(sites))}), and one Slurm"
            " plays one of them",
            where=run_yaml,
            hint="rehearse each stage's run.yaml by itself",
        )
    requests = {
        name: _request(
            plan, replace(wishes, jobs=plan.spec.num_links), chosen if name == stage else ()
        )
        for name, plan in zip(names, plans)
    }
    return Wanted(
        plans, requests, None, pipeline, tuple(planned.stage.source for planned in pipeline.stages)
    )


def _faults_of_stage(text: str | None, names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The stage whose links meet the faults, and those, from `STAGE:F,F`."""
    if not text:
        return "", ()
    stage, colon, words = text.partition(":")
    if not colon or stage not in names:
        raise UsageError(
            f"`--faults {text}` does not say which stage they hit",
            hint=f"--faults {names[0]}:{text.partition(':')[2] or text}",
            why=f"the stages are {', '.join(names)}",
        )
    return stage, _faults(words)


def _request(plan: Plan, wishes: Wishes, chosen: tuple[str, ...]) -> Request:
    if plan.errors and not (
        wishes.no_check
        and plan.resolved.argv
        and (plan.resolved.configs or not plan.resolved.config_for)
    ):
        raise UsageError(plan.problems)
    script = _own_script(wishes.job_script, plan) if wishes.job_script else None
    with_faults = max(plan.spec.num_links, len(chosen) + 1) if chosen else 1
    request = Request(
        num_jobs=wishes.jobs or with_faults,
        faults=chosen,
        accounts=tuple(wishes.accounts),
        accounting=wishes.accounting,
        job_script=script,
        speed=wishes.speed or 0.0,
        keep=wishes.keep,
        directory=wishes.directory,
        limits_only=wishes.limits_only,
    )
    if len(chosen) > request.num_jobs:
        raise UsageError(
            f"{len(chosen)} faults need at least as many links, and `--jobs` is {request.num_jobs}"
        )
    if wishes.limits_only and (chosen or wishes.keep or wishes.picture):
        raise UsageError(
            "`--limits-only` starts nothing, so it goes with none of --faults, --keep, --picture"
        )
    if chosen and plan.resolved.guard.layout == "none":
        raise UsageError(
            "`--faults` needs a run with checkpoints, and the recipe's `layout` is none"
        )
    return request


def bars_of(plan: Plan, outcome: Outcome) -> list[Bar]:
    return timeline.bars(
        plan, outcome.attempts, outcome.links, outcome.states, outcome.waited_s, outcome.scenario
    )


def all_bars(wanted: Wanted, outcomes: Sequence[Outcome]) -> list[list[Bar]]:
    """The bars of each run, those of a pipeline's stages on one clock."""
    found = [bars_of(plan, outcome) for plan, outcome in zip(wanted.plans, outcomes)]
    if not wanted.pipeline:
        return found
    together = timeline.of_stages(
        list(zip([outcome.stage for outcome in outcomes], wanted.sources, found))
    )
    return [[bar for bar in together if bar.stage == outcome.stage] for outcome in outcomes]


def picture(wanted: Wanted, found: Sequence[Sequence[Bar]]) -> str:
    plan = wanted.plans[0]
    what = f"{plan.spec.name}: {plan.spec.num_nodes} nodes"
    if wanted.pipeline:
        what = f"{wanted.pipeline.spec.name}: {len(wanted.plans)} stages"
    return timeline.svg(
        [bar for own in found for bar in own], f"{what} of {plan.site.name}, rehearsed"
    )


def lines(wanted: Wanted, outcomes: Sequence[Outcome], found: Sequence[Sequence[Bar]]) -> list[str]:
    """What goes to standard output: the shapes, what the tasks saw, and one timeline."""
    out = [line for plan, outcome in zip(wanted.plans, outcomes) for line in _seen(plan, outcome)]
    bars = [bar for own in found for bar in own]
    out += timeline.text(bars)
    out += [
        f"after link {link}: side job {job_id}, {outcome.states.get(job_id, 'unknown').lower()}"
        for outcome in outcomes
        for link, job_id in outcome.side.items()
    ]
    if bars:
        hours, lost = sum(bar.gpu_hours for bar in bars), sum(bar.lost for bar in bars)
        out.append(
            f"{hours:,.1f} GPU-hours in {format_time(round(max(bar.end_s for bar in bars)))},"
            f" {lost} iterations lost"
        )
    bad = [
        problem for outcome in outcomes for problem in outcome.problems if problem.level == "error"
    ]
    num_jobs = sum(len(outcome.jobs) for outcome in outcomes)
    jobs = "the job" if num_jobs == 1 else f"all {num_jobs} jobs"
    played = any(outcome.attempts for outcome in outcomes)
    good = "all right" if played else f"Slurm takes {jobs}"
    return [*out, f"{len(bad)} thing{'s' * (len(bad) > 1)} would go wrong" if bad else good]


def _seen(plan: Plan, outcome: Outcome) -> list[str]:
    """The shape of one run, and each start of its step as the tasks saw it."""
    spec, head = plan.spec, f"stage {outcome.stage}: " if outcome.stage else ""
    out = [
        f"{head}{spec.num_nodes} nodes x {plan.tasks_per_node} tasks on"
        f" {plan.partition.name or 'the default partition'} of {plan.site.name}"
    ]
    for attempt in outcome.attempts:
        if attempt.tasks:
            first = attempt.tasks[0]
            nodes = {task.get("SLURMD_NODENAME", "") for task in attempt.tasks}
            word = f"job {attempt.job_id}" + (
                f" restart {attempt.restart}" if attempt.restart else ""
            )
            out.append(
                f"{word}: {len(attempt.tasks)} ranks on {len(nodes)} nodes, rendezvous "
                f"{first.get('MASTER_ADDR', '(none)')}:{first.get('MASTER_PORT', '(none)')}"
            )
    return out


def notes(plan: Plan, outcome: Outcome) -> list[str]:
    """What was made up, and how sure the times are."""
    out = []
    kinds = [item for item in outcome.scene.made]
    if kinds:
        out.append(
            "made up for the rehearsal:"
            f" {', '.join(f'{item.what} `{item.path}`' for item in kinds[:4])}"
            + (f" and {len(kinds) - 4} more" if len(kinds) > 4 else "")
        )
    out += [
        f"not here and not made up: the {what} `{path}`" for what, path in outcome.scene.missing
    ]
    if not outcome.scenario["step_time_known"]:
        out.append(
            f"times assume {outcome.scenario['step_time_s']:.3g} s an iteration (a run that takes"
            " half its `time:`); `estimate: {step_time_s: …}` tells better"
        )
    if outcome.kept:
        out.append(
            f"kept in {outcome.kept}: look with `hpctrain sandbox shell --dir"
            f" {outcome.kept}/sandbox`, end it with `hpctrain sandbox down` and the same --dir"
        )
    return out


def as_json(
    wanted: Wanted, outcomes: Sequence[Outcome], found: Sequence[Sequence[Bar]]
) -> dict[str, Any]:
    """The whole answer as plain data: of a run, or `stages` with one each."""
    answers = [
        _as_json(plan, outcome, own) for plan, outcome, own in zip(wanted.plans, outcomes, found)
    ]
    if not wanted.pipeline:
        return answers[0]
    return {
        "ok": all(outcome.ok for outcome in outcomes),
        "pipeline": wanted.pipeline.spec.name,
        "gpu_hours": sum(answer["gpu_hours"] for answer in answers),
        "site_s": max((bar.end_s for own in found for bar in own), default=0.0),
        "stages": [
            {"stage": outcome.stage, "from": source, **answer}
            for outcome, source, answer in zip(outcomes, wanted.sources, answers)
        ],
    }


def _as_json(plan: Plan, outcome: Outcome, found: Sequence[Bar]) -> dict[str, Any]:
    return {
        "ok": outcome.ok,
        "run": plan.spec.name,
        "site": plan.site.name,
        "num_nodes": plan.spec.num_nodes,
        "tasks_per_node": plan.tasks_per_node,
        "jobs": {str(link): job_id for link, job_id in outcome.jobs.items()},
        "side_jobs": {str(link): job_id for link, job_id in outcome.side.items()},
        "states": dict(outcome.states),
        "refused": outcome.refused or None,
        "problems": [problem.as_json() for problem in outcome.problems],
        "timeline": [bar.as_json() for bar in found],
        "gpu_hours": sum(bar.gpu_hours for bar in found),
        "lost_iterations": sum(bar.lost for bar in found),
        "step_time_s": outcome.scenario["step_time_s"],
        "step_time_known": outcome.scenario["step_time_known"],
        "speed": outcome.scenario["speed"],
        "made_up": [{"what": item.what, "path": item.path} for item in outcome.scene.made],
        "missing": [{"what": what, "path": path} for what, path in outcome.scene.missing],
        "ranks": [
            {name: value for name, value in sorted(task.items()) if name != "folder"}
            for attempt in outcome.attempts
            for task in attempt.tasks
        ],
        "job_script_sha256": outcome.script_sha256,
        "seconds": dict(outcome.seconds),
    }


def _faults(text: str | None) -> tuple[str, ...]:
    words = [word.strip() for word in text.split(",")] if text else []
    problems = [
        Problem(f"`{word}` is not a fault", hint=f"one of {', '.join(FAULTS)}, or none")
        for word in words
        if word not in (*FAULTS, "none")
    ]
    if problems:
        raise UsageError(problems)
    return tuple("" if word == "none" else word for word in words)


def _own_script(path: str, plan: Plan) -> bytes:
    """The script; one that was rendered for another run directory would read and write there,
    outside of the rehearsal."""
    content = _read(path)
    found = re.search(r"(?m)^export HPCTRAIN_RUN_DIR=(.+)$", content.decode("utf-8", "replace"))
    words = shlex.split(found[1]) if found else [plan.run_dir]
    if words[:1] != [plan.run_dir]:
        raise UsageError(
            f"this job script is of the run directory `{words[0]}`",
            where=path,
            why=f"the rehearsal plays `{plan.run_dir}`",
            hint=f"-o {shlex.quote(words[0])}",
        )
    return content


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as error:
        raise EnvironmentFault(f"cannot be read: {error.strerror}", where=path) from error
