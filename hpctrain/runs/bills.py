"""Prices a run.yaml and a ladder with the planner, asks what is left of the allocation, and prints bills."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpctrain.base import terminal
from hpctrain.base.errors import UsageError
from hpctrain.base.units import format_duration
from hpctrain.plan.load import load_plan
from hpctrain.plan.make import Plan
from hpctrain.plan.render import plan_json
from hpctrain.runs import cost
from hpctrain.runs.cost import Allocation, Bill, Spent
from hpctrain.triage.records import utc


def planned(
    path: str, assignments: Sequence[str], jobs: int | None, array: int | None, ladder: str | None
) -> tuple[Plan, list[Bill]]:
    """The plan of a run.yaml and its bills. Raises UsageError with the plan's errors."""
    loaded = load_plan(path, assignments)
    if loaded.plan.errors:
        raise UsageError(loaded.plan.errors)
    bills = cost.before(plan_json(loaded.plan, loaded.inputs), jobs, array)
    if ladder:
        bills += rungs(path, assignments, loaded.plan, parse_rungs(ladder))
    return loaded.plan, bills


def parse_rungs(text: str) -> list[int]:
    """`1,2,8` -> [1, 2, 8]. Raises UsageError for anything that is not a rising list of GPU counts."""
    parts = [part.strip() for part in text.split(",")]
    if not parts or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"`{text}` is not a ladder", hint="numbers of GPUs, such as 1,2,8")
    numbers = [int(part) for part in parts]
    if numbers != sorted(set(numbers)):
        raise UsageError(f"the rungs of `{text}` do not rise", hint="smallest first, each once")
    return numbers


def shape_of_rung(num_gpus: int, per_node: int) -> tuple[int, int]:
    """(nodes, GPUs a node) of a rung. Raises UsageError where it does not fill its nodes evenly."""
    if per_node < 1:
        raise UsageError("this site's nodes have no GPUs to climb with", hint="a ladder needs a GPU partition")
    if num_gpus <= per_node:
        return 1, num_gpus
    if num_gpus % per_node:
        raise UsageError(
            f"{num_gpus} GPUs do not fill nodes of {per_node}", hint=f"use multiples of {per_node} above one node"
        )
    return num_gpus // per_node, per_node


def rungs(path: str, assignments: Sequence[str], plan: Plan, numbers: Sequence[int]) -> list[Bill]:
    """The bill of one job at each rung, as the planner prices it, and their sum."""
    bills = []
    for number in numbers:
        nodes, gpus = shape_of_rung(number, plan.node_type.gpus)
        loaded = load_plan(path, [*assignments, f"nodes={nodes}", f"gpus_per_node={gpus}"])
        job = cost.full_job(plan_json(loaded.plan, loaded.inputs))
        assert job is not None
        bills.append(job.times(1, f"rung of {number} GPU{'s' if number > 1 else ''}", job.note))
    billed = None if any(bill.billed is None for bill in bills) else sum(bill.billed or 0.0 for bill in bills)
    total = Bill(
        "the ladder",
        sum(b.time_s for b in bills),
        sum(b.node_hours for b in bills),
        sum(b.gpu_hours for b in bills),
        billed,
        bills[0].unit,
        "at most",
    )
    return [*bills, total]


def allocation(plan: Plan) -> Allocation | None:
    """What is left of the run's account, where the site's profile names a tool that tells it and the tool is here."""
    rules = plan.site.values["tools"].get("allocation")
    unit = plan.cost.unit
    if not rules or not plan.spec.account or unit not in rules["patterns"]:
        return None
    return cost.ask_allocation(rules["command"], rules["patterns"][unit], plan.spec.account, unit)


def show_bills(bills: Sequence[Bill], left: Allocation | None) -> None:
    """Bills as a table; what is left of the allocation after the largest of them to stderr."""
    terminal.table(
        [(bill.what, format_duration(bill.time_s), *_hours(bill), bill.note) for bill in bills],
        ("of", "time", "node-hours", "GPU-hours", "billed", "note"),
    )  # fmt: skip
    if left is not None:
        terminal.info(f"left of {left.account}: {left.left:,.0f} of {left.granted:,.0f} {left.unit}s")
        most = max((bill.billed or 0.0 for bill in bills), default=0.0)
        if most > left.left:
            terminal.info(
                f"{terminal.paint('warning', 'yellow')}: this may need {most:,.0f} {left.unit}s, more than is left"
            )


def spent_fields(result: Spent) -> dict[str, Any]:
    """Everything for `--json`."""
    return {
        "starts": [
            {"link": s.link, "job_id": s.job_id, "restart": s.restart, "state": s.state, "start": utc(s.start_s), "end": utc(s.end_s),
             "elapsed_s": s.elapsed_s, "source": s.source, **bill.as_json()}
            for s, bill in result.starts
        ],
        "used": result.used.as_json(), "still": result.still.as_json(), "unseen": list(result.unseen),
    }  # fmt: skip


def show_spent(result: Spent) -> None:
    """Each start of each job, then the sums."""
    rows: list[tuple[object, ...]] = [
        (
            bill.what,
            start.job_id,
            start.restart or "",
            start.state,
            "unknown" if start.elapsed_s is None else format_duration(start.elapsed_s),
            *_hours(bill),
        )
        for start, bill in result.starts
    ]
    for bill in (result.used, result.still):
        rows.append((bill.what, "", "", "", format_duration(bill.time_s), *_hours(bill)))
    terminal.table(rows, ("of", "job", "restart", "state", "time", "node-hours", "GPU-hours", "billed"))
    for what in result.unseen:
        terminal.info(f"could not see: {what}")


def _hours(bill: Bill) -> tuple[str, str, str]:
    billed = "unknown" if bill.billed is None else f"{bill.billed:,.2f} {bill.unit}s"
    return f"{bill.node_hours:,.2f}", f"{bill.gpu_hours:,.2f}", billed
