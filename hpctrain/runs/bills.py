"""Prices a run.yaml and a ladder with the planner, asks what is left of the allocation, and prints
bills."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpctrain.base import terminal
from hpctrain.base.errors import Refused, UsageError
from hpctrain.base.units import format_duration
from hpctrain.plan.load import load_plan
from hpctrain.plan.make import Plan
from hpctrain.plan.render import plan_json
from hpctrain.runs import cost
from hpctrain.runs.cost import Allocation, Bill, Spent

AMOUNTS = ("node-hours", "GPU-hours", "billed")


def planned(
    path: str, assignments: Sequence[str], jobs: int | None, array: int | None
) -> tuple[Plan, list[Bill]]:
    """The plan of a run.yaml and its bills. Raises UsageError with the plan's errors."""
    loaded = load_plan(path, assignments)
    if loaded.plan.errors:
        raise UsageError(loaded.plan.errors)
    return loaded.plan, cost.before(plan_json(loaded.plan, loaded.inputs), jobs, array)


def allocation(plan: Plan) -> Allocation | None:
    """What is left of the run's account, where the site's profile names a tool that tells it and
    the tool is here."""
    rules = plan.site.values["tools"].get("allocation")
    unit = plan.cost.unit
    if not rules or not plan.spec.account or unit not in rules["patterns"]:
        return None
    try:
        plan.site.check_trust()
    except Refused as refusal:
        terminal.problems(refusal.problems)
        return None
    return cost.ask_allocation(rules["command"], rules["patterns"][unit], plan.spec.account, unit)


def show_bills(bills: Sequence[Bill], left: Allocation | None) -> None:
    """Bills as a table; what is left of the allocation after the largest of them to stderr."""
    terminal.table(
        [(bill.what, format_duration(bill.time_s), *amounts(bill), bill.note) for bill in bills],
        ("of", "time", *AMOUNTS, "note"),
    )
    if left is not None:
        show_left(left, max((bill.billed or 0.0 for bill in bills), default=0.0))


def show_left(left: Allocation, need: float) -> None:
    """What is left of the allocation, and a warning where `need` is more, to stderr."""
    terminal.info(f"left of {left.account}: {left.left:,.0f} of {left.granted:,.0f} {left.unit}s")
    if need > left.left:
        terminal.info(
            f"{terminal.paint('warning', 'yellow')}: this may need {need:,.0f} {left.unit}s,"
            " more than is left"
        )


def spent_fields(result: Spent) -> dict[str, Any]:
    """Everything for `--json`."""
    return {
        "starts": [{**start.as_json(), **bill.as_json()} for start, bill in result.starts],
        "used": result.used.as_json(),
        "still": result.still.as_json(),
        "unseen": list(result.unseen),
    }


def show_spent(result: Spent) -> None:
    """Each start of each job, then the sums."""
    rows: list[tuple[object, ...]] = [
        (
            bill.what,
            start.job_id,
            start.restart or "",
            start.state,
            "unknown" if start.elapsed_s is None else format_duration(start.elapsed_s),
            *amounts(bill),
        )
        for start, bill in result.starts
    ]
    for bill in (result.used, result.still):
        rows.append((bill.what, "", "", "", format_duration(bill.time_s), *amounts(bill)))
    terminal.table(rows, ("of", "job", "restart", "state", "time", *AMOUNTS))
    terminal.unseen(result.unseen)


def amounts(bill: Bill) -> tuple[str, str, str]:
    """A bill as text, under the headings `AMOUNTS`."""
    billed = "unknown" if bill.billed is None else f"{bill.billed:,.2f} {bill.unit}s"
    return f"{bill.node_hours:,.2f}", f"{bill.gpu_hours:,.2f}", billed
