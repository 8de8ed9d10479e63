"""From the command line to a request, and from an outcome to what is printed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.errors import EnvironmentFault, HpctrainError, Problem, Refused, UsageError
from hpctrain.load import Loaded, load_plan
from hpctrain.plan import Plan
from hpctrain.rehearse import timeline
from hpctrain.rehearse.play import FAULTS, Outcome, Request
from hpctrain.rehearse.timeline import Bar
from hpctrain.units import format_time
from hpctrain.yamlio import load_yaml


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


def prepare(
    run_yaml: str, assignments: Sequence[str], out_dir: str | None, wishes: Wishes
) -> list[tuple[Loaded, Request]]:
    """The plan and the request of a run, or of each stage of a pipeline, in order.

    Raises UsageError for an invalid run (unless `no_check` and it can be rendered) or option.
    """
    if wishes.picture and os.path.lexists(wishes.picture):
        raise Refused(
            "is there already, and is left as it is", where=wishes.picture, hint="name another file with --picture"
        )
    if not _is_pipeline(run_yaml):
        loaded = load_plan(run_yaml, [*assignments, *([f"nodes={wishes.nodes}"] if wishes.nodes else [])], out_dir)
        return [(loaded, _request(loaded, wishes))]
    if wishes.nodes or wishes.job_script or wishes.keep or wishes.picture:
        raise UsageError("--nodes, --job, --keep and --picture are for one run, and this is a pipeline", where=run_yaml,
                         hint="for a stage: --set STAGE.nodes=4")  # fmt: skip
    from hpctrain.pipeline.stages import load_pipeline

    pipeline = load_pipeline(run_yaml, assignments, out_dir)
    stages = {planned.stage.name: planned.loaded for planned in pipeline.stages}
    return [
        (
            planned.loaded,
            _request(planned.loaded, wishes, stages[planned.stage.source] if planned.stage.source else None),
        )
        for planned in pipeline.stages
    ]


def _is_pipeline(path: str) -> bool:
    try:
        return isinstance(load_yaml(path).get("stages"), dict)
    except HpctrainError:
        return False  # said when it is read as a run


def _request(loaded: Loaded, wishes: Wishes, earlier: Loaded | None = None) -> Request:
    plan, chosen = loaded.plan, _faults(wishes.faults)
    if plan.errors and not (
        wishes.no_check and plan.resolved.argv and (plan.resolved.configs or not plan.resolved.config_for)
    ):
        raise UsageError(plan.problems)
    script = _read(wishes.job_script) if wishes.job_script else None
    with_faults = max(plan.spec.num_links, len(chosen) + 1) if chosen else 1
    request = Request(
        num_jobs=wishes.jobs or with_faults, faults=chosen, accounts=tuple(wishes.accounts), accounting=wishes.accounting,
        job_script=script, speed=wishes.speed or 0.0, keep=wishes.keep, directory=wishes.directory,
        limits_only=wishes.limits_only, earlier=earlier,
    )  # fmt: skip
    if len(chosen) > request.num_jobs:
        raise UsageError(f"{len(chosen)} faults need at least as many links, and `--jobs` is {request.num_jobs}")
    if wishes.limits_only and (chosen or wishes.keep or wishes.picture):
        raise UsageError("`--limits-only` starts nothing, so it goes with none of --faults, --keep, --picture")
    if chosen and plan.resolved.guard.layout == "none":
        raise UsageError("`--faults` needs a run with checkpoints, and the recipe's `layout` is none")
    return request


def bars_of(plan: Plan, outcome: Outcome) -> list[Bar]:
    return timeline.bars(plan, outcome.attempts, outcome.links, outcome.states, outcome.waited_s, outcome.scenario)


def picture(plan: Plan, found: Sequence[Bar]) -> str:
    title = f"{plan.spec.name}: {plan.spec.num_nodes} nodes of {plan.site.name}, rehearsed"
    return timeline.svg(found, title)


def lines(plan: Plan, outcome: Outcome, found: Sequence[Bar]) -> list[str]:
    """What goes to standard output: the shape, what the tasks saw, and the timeline."""
    spec = plan.spec
    out = [
        f"{spec.num_nodes} nodes x {plan.tasks_per_node} tasks on {plan.partition.name or 'the default partition'} of {plan.site.name}"
    ]
    for attempt in outcome.attempts:
        if attempt.tasks:
            first = attempt.tasks[0]
            nodes = {task.get("SLURMD_NODENAME", "") for task in attempt.tasks}
            word = f"job {attempt.job_id}" + (f" restart {attempt.restart}" if attempt.restart else "")
            out.append(f"{word}: {len(attempt.tasks)} ranks on {len(nodes)} nodes, rendezvous "
                       f"{first.get('MASTER_ADDR', '(none)')}:{first.get('MASTER_PORT', '(none)')}")  # fmt: skip
    out += timeline.text(found)
    out += [
        f"after link {link}: side job {job_id}, {outcome.states.get(job_id, 'unknown').lower()}"
        for link, job_id in outcome.side.items()
    ]
    if found:
        hours, lost = sum(bar.gpu_hours for bar in found), sum(bar.lost for bar in found)
        out.append(
            f"{hours:,.1f} GPU-hours in {format_time(round(sum(bar.took_s for bar in found)))}, {lost} iterations lost"
        )
    bad = [problem for problem in outcome.problems if problem.level == "error"]
    good = (
        "all right"
        if outcome.attempts
        else f"Slurm takes {'the job' if len(outcome.jobs) == 1 else f'all {len(outcome.jobs)} jobs'}"
    )
    out.append(f"{len(bad)} thing{'s' * (len(bad) > 1)} would go wrong" if bad else good)
    return out


def notes(plan: Plan, outcome: Outcome) -> list[str]:
    """What was made up, and how sure the times are."""
    out = []
    kinds = [item for item in outcome.scene.made]
    if kinds:
        out.append(f"made up for the rehearsal: {', '.join(f'{item.what} `{item.path}`' for item in kinds[:4])}"
                   + (f" and {len(kinds) - 4} more" if len(kinds) > 4 else ""))  # fmt: skip
    out += [f"not here and not made up: the {what} `{path}`" for what, path in outcome.scene.missing]
    if not outcome.scenario["step_time_known"]:
        out.append(f"times assume {outcome.scenario['step_time_s']:.3g} s an iteration (a run that takes half its `time:`); "
                   "`estimate: {step_time_s: …}` tells better")  # fmt: skip
    if outcome.kept:
        out.append(
            f"kept in {outcome.kept}: look with `hpctrain sandbox shell --dir {outcome.kept}/sandbox`, end it with `hpctrain sandbox down` and the same --dir"
        )
    return out


def as_json(plan: Plan, outcome: Outcome, found: Sequence[Bar]) -> dict[str, Any]:
    """The whole answer as plain data."""
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
        "ranks": [dict(sorted(task.items())) for attempt in outcome.attempts for task in attempt.tasks],
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


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as error:
        raise EnvironmentFault(f"cannot be read: {error.strerror}", where=path) from error
