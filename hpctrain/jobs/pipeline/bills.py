"""What a pipeline costs: every stage at most, what each has used, what its jobs may still use, and
the sums."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.base import terminal
from hpctrain.base.errors import Problem, UsageError
from hpctrain.base.units import format_duration
from hpctrain.config.pipeline import is_pipeline
from hpctrain.jobs.pipeline.stages import load_pipeline
from hpctrain.plan.make import Plan
from hpctrain.plan.render import plan_json
from hpctrain.runs import bills as run_bills
from hpctrain.runs import cost
from hpctrain.runs.cost import Allocation, Bill, Spent
from hpctrain.runs.live import ask
from hpctrain.runs.records import find_pipeline, is_run_dir, read_pipeline_index, read_run


@dataclass(frozen=True)
class StageCost:
    """`at_most`: all links of the stage running their whole time. `spent` is None before its run
    directory is there."""

    stage: str
    run: str
    run_dir: str
    num_links: int
    at_most: Bill
    spent: Spent | None


@dataclass(frozen=True)
class Sum:
    """Bills added up. `billed` is by unit, since stages on CPU and GPU nodes may be billed in
    different ones; None where a part of it has no formula."""

    what: str
    time_s: float
    node_hours: float
    gpu_hours: float
    billed: Mapping[str, float] | None


def add(what: str, bills: Iterable[Bill]) -> Sum:
    """The sum of bills, each unit by itself."""
    added = list(bills)
    billed: dict[str, float] = {}
    for bill in added:
        billed[bill.unit] = billed.get(bill.unit, 0.0) + (bill.billed or 0.0)
    return Sum(
        what,
        sum((bill.time_s for bill in added), 0.0),
        sum((bill.node_hours for bill in added), 0.0),
        sum((bill.gpu_hours for bill in added), 0.0),
        None if any(bill.billed is None for bill in added) else billed,
    )


def read(
    target: str, assignments: Sequence[str]
) -> tuple[str, list[StageCost], list[Allocation]] | None:
    """Name, stages and allocations of the pipeline that `target` names, None when it names none.

    A pipeline.yaml is planned anew; a folder or a name is what was rendered. Asks Slurm once for
    the jobs of all stages. Raises UsageError with every problem of the stages.
    """
    if target.endswith((".yaml", ".yml")) and os.path.isfile(target) and is_pipeline(target):
        pipeline = load_pipeline(target, assignments)
        if pipeline.errors:
            raise UsageError(list(dict.fromkeys(pipeline.errors)))
        plans = [planned.plan for planned in pipeline.stages]
        contents = [
            (found.stage.name, found.run_dir, plan_json(found.plan, found.loaded.inputs))
            for found in pipeline.stages
        ]
        return pipeline.spec.name, stages(contents), _allocations(plans)
    folder = find_pipeline(target)
    if folder is None:
        return None
    if assignments:
        raise UsageError(
            f"`--set` on `{target}`, which is rendered already",
            hint="name the pipeline.yaml to plan it anew",
        )
    index = read_pipeline_index(folder)
    found = [
        (str(stage["stage"]), os.path.abspath(os.path.join(folder, str(stage["run_dir"]))))
        for stage in index["stages"]
    ]
    gone = [
        Problem(
            f"stage `{name}` has no run directory",
            where=path,
            hint="`hpctrain pipeline` writes it again",
        )
        for name, path in found
        if not is_run_dir(path)
    ]
    if gone:
        raise UsageError(gone)
    return (
        index["pipeline"],
        stages([(name, path, read_run(path).plan) for name, path in found]),
        [],
    )


def stages(contents: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[StageCost]:
    """Each stage's cost from (name, run directory, plan.json's content). Raises UsageError where a
    plan tells no cost."""
    found, answer = ask([read_run(path) for _, path, _ in contents if is_run_dir(path)])
    runs, now_s = {run.run_dir: run for run in found}, time.time()
    out = []
    for name, path, content in contents:
        job = cost.full_job(content)
        if job is None:
            raise UsageError(
                f"the plan of stage `{name}` does not tell what a job costs",
                where=path,
                hint="render it again with `hpctrain pipeline`",
            )
        num_links = int(content["job"].get("num_links") or 1)
        work = [
            f"{bill.what}: {_hours(bill, 'GPU-hours' if bill.gpu_hours else 'node-hours')[0]}"
            for bill in cost.before(content)
            if "iterations" in bill.what
        ]
        run = runs.get(os.path.abspath(path))
        out.append(
            StageCost(
                name,
                str(content.get("run") or name),
                path,
                num_links,
                job.times(num_links, name, "; ".join(work)),
                cost.spent(run, answer, now_s) if run else None,
            )
        )
    return out


def sums(found: Sequence[StageCost]) -> tuple[Sum, Sum, Sum]:
    """What the whole pipeline costs at most, has used, and may still use."""
    spent = [stage.spent for stage in found if stage.spent]
    return (
        add("at_most", [stage.at_most for stage in found]),
        add("used", [one.used for one in spent]),
        add("still", [one.still for one in spent]),
    )


def fields(name: str, found: Sequence[StageCost], left: Sequence[Allocation]) -> dict[str, Any]:
    """Everything for `--json`."""
    return {
        "pipeline": name,
        "stages": [
            {
                "stage": s.stage,
                "run": s.run,
                "run_dir": s.run_dir,
                "num_links": s.num_links,
                "at_most": s.at_most.as_json(),
                "spent": run_bills.spent_fields(s.spent) if s.spent else None,
            }
            for s in found
        ],
        **{total.what: vars(total) for total in sums(found)},
        "allocations": [vars(one) for one in left],
    }


def show(found: Sequence[StageCost], left: Sequence[Allocation]) -> None:
    """One table: a row a stage and the sum. At most, and once there are jobs what they used and
    what may still come.

    Hours are GPU-hours, or node-hours where no stage has a GPU; `--json` has both.
    """
    at_most, used, still = sums(found)
    unit = "GPU-hours" if at_most.gpu_hours else "node-hours"
    parts: list[tuple[str, list[Bill | None], Sum]] = [
        ("", [stage.at_most for stage in found], at_most)
    ]
    if any(stage.spent for stage in found):
        parts += [
            ("used ", [stage.spent.used if stage.spent else None for stage in found], used),
            ("still ", [stage.spent.still if stage.spent else None for stage in found], still),
        ]
    header = ["of", "links", "time"]
    rows: list[list[object]] = [
        [s.stage, s.num_links, format_duration(s.at_most.time_s)] for s in found
    ]
    rows.append(["the pipeline", sum(s.num_links for s in found), format_duration(at_most.time_s)])
    for what, bills, total in parts:
        header += [what + unit, what + "billed"]
        both: list[Bill | Sum | None] = [*bills, total]
        for row, bill in zip(rows, both):
            row += _hours(bill, unit)
    header.append("note")
    for row, stage in zip(rows, found):
        row.append(stage.at_most.note)
    rows[-1].append("at most: links that find nothing to do end at once")
    terminal.table(rows, header)
    terminal.unseen(
        f"stage {s.stage}: {what}" for s in found for what in (s.spent.unseen if s.spent else ())
    )
    for one in left:
        need = (at_most.billed or {}).get(one.unit, 0.0) - (used.billed or {}).get(one.unit, 0.0)
        run_bills.show_left(one, need)


def _hours(bill: Bill | Sum | None, unit: str) -> tuple[str, str]:
    if bill is None:
        return "", ""
    hours = bill.gpu_hours if unit == "GPU-hours" else bill.node_hours
    by_unit: Mapping[str, float] | None
    if isinstance(bill, Bill):
        by_unit = None if bill.billed is None else {bill.unit: bill.billed}
    else:
        by_unit = bill.billed
    billed = (
        "unknown"
        if by_unit is None
        else " + ".join(f"{value:,.2f} {name}s" for name, value in by_unit.items())
    )
    return f"{hours:,.2f}", billed or "0"


def _allocations(plans: Sequence[Plan]) -> list[Allocation]:
    """What is left, once for each account and unit that the stages are billed to."""
    found = {(plan.spec.account, plan.cost.unit): plan for plan in plans}
    return [left for left in map(run_bills.allocation, found.values()) if left is not None]
