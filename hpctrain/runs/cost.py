"""What a run costs: before, from its plan; after, from the time that every start of its jobs really
took.

The formulas are the site profile's (`estimate.cost`); a job's bill grows with its time, so used
time is billed in proportion.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import UsageError
from hpctrain.runs.records import RunRecords
from hpctrain.runs.starts import Start, jobs_of
from hpctrain.slurm.jobs import Answer

_ACCOUNT = "{" + "account" + "}"


@dataclass(frozen=True)
class Bill:
    """Hours and billing units of something. `billed` is None where the profile tells no formula;
    `unit` is the site's."""

    what: str
    time_s: float
    node_hours: float
    gpu_hours: float
    billed: float | None
    unit: str
    note: str = ""

    def times(self, count: float, what: str, note: str = "") -> Bill:
        billed = None if self.billed is None else self.billed * count
        return Bill(
            what,
            self.time_s * count,
            self.node_hours * count,
            self.gpu_hours * count,
            billed,
            self.unit,
            note,
        )

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Spent:
    """What a run has used, each start of each job, and what its queued and running jobs may still
    use at most."""

    starts: tuple[tuple[Start, Bill], ...]
    used: Bill
    still: Bill
    unseen: tuple[str, ...]


@dataclass(frozen=True)
class Allocation:
    """What the site's own tool says of the project: used and granted, in `unit`."""

    account: str
    used: float
    granted: float
    unit: str

    @property
    def left(self) -> float:
        return self.granted - self.used


def full_job(plan: Mapping[str, Any]) -> Bill | None:
    """The bill of one job that runs its whole time, from plan.json; None when the plan does not
    tell."""
    job, cost = plan.get("job"), plan.get("cost")
    if not isinstance(job, Mapping) or not isinstance(cost, Mapping):
        return None
    time_s, node_hours, gpu_hours = job.get("time_s"), cost.get("node_hours"), cost.get("gpu_hours")
    if (
        not all(
            isinstance(value, (int, float)) and value >= 0
            for value in (time_s, node_hours, gpu_hours)
        )
        or not time_s
    ):
        return None
    billed = cost.get("billed")
    return Bill(
        "one job",
        float(time_s),
        float(node_hours or 0),
        float(gpu_hours or 0),
        float(billed) if isinstance(billed, (int, float)) else None,
        str(cost.get("unit") or ""),
        str(cost.get("formula") or ""),
    )


def used_by(job: Bill, elapsed_s: float, what: str) -> Bill:
    """The bill of `elapsed_s` of such a job."""
    return job.times(elapsed_s / job.time_s, what)


def spent(run: RunRecords, answer: Answer, now_s: float) -> Spent:
    """What the run used and may still use. Raises UsageError when plan.json does not tell what a
    job costs."""
    job = full_job(run.plan)
    if job is None:
        raise UsageError(
            f"the plan.json of `{run.run_dir}` does not tell what a job costs",
            hint="render it again with `hpctrain render`",
        )
    unseen = list(dict.fromkeys([*run.unseen, *answer.unseen]))
    rows = []
    jobs = jobs_of(run, answer, now_s)
    for start in (start for history in jobs for start in history.starts):
        name = f"link {start.link}" if start.link is not None else f"job {start.job_id}"
        if start.elapsed_s is None:
            what = f"how long job {start.job_id} ran"
            unseen.append(f"{what}; counted as nothing, at most {job.time_s / 3600:g} h")
        rows.append((start, used_by(job, start.elapsed_s or 0.0, name)))
    used = total([bill for _, bill in rows], job, "used")
    waiting = sum(bool(history.slurm and history.slurm.pending) for history in jobs)
    left = [max(job.time_s - (start.elapsed_s or 0.0), 0.0) for start, _ in rows if start.active]
    still = used_by(
        job,
        waiting * job.time_s + sum(left),
        f"still, at most ({waiting} pending, {len(left)} running)",
    )
    return Spent(tuple(rows), used, still, tuple(unseen))


def total(bills: Sequence[Bill], like: Bill, what: str, note: str = "") -> Bill:
    """The sum of bills in the unit of `like`; `billed` is None where it is so for any of them."""
    unknown = like.billed is None or any(bill.billed is None for bill in bills)
    billed = None if unknown else sum(bill.billed or 0.0 for bill in bills)
    return Bill(
        what,
        sum(b.time_s for b in bills),
        sum(b.node_hours for b in bills),
        sum(b.gpu_hours for b in bills),
        billed,
        like.unit,
        note,
    )


def before(
    plan: Mapping[str, Any], jobs: int | None = None, array: int | None = None
) -> list[Bill]:
    """The bills of a planned run: one job, the chain at most, the work itself where iterations and
    step time are known, an array."""
    job = full_job(plan)
    if job is None:
        raise UsageError("the plan does not tell what a job costs")
    facts = plan["job"]
    count = jobs if jobs is not None else int(facts.get("num_links") or 1)
    out = [job]
    if count > 1:
        out.append(
            job.times(
                count,
                f"a chain of {count} jobs",
                "at most: links that find nothing to do end at once",
            )
        )
    step_s, iterations = facts.get("step_time_s"), facts.get("iterations")
    if isinstance(step_s, (int, float)) and isinstance(iterations, int):
        out.append(used_by(job, step_s * iterations, f"{iterations} iterations of {step_s:g} s"))
    if array:
        out.append(job.times(array, f"an array of {array} such jobs", "at most"))
    return out


def ask_allocation(
    command: Sequence[str], pattern: str, account: str, unit: str
) -> Allocation | None:
    """What the site's tool says is left of a project; None when it is not there or says something
    else.

    `pattern` is the profile's regex with groups `used` and `granted`; `{account}` in it stands for
    the project.
    """
    try:
        said = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return read_allocation(said, pattern, account, unit)


def read_allocation(said: str, pattern: str, account: str, unit: str) -> Allocation | None:
    """Pure part of `ask_allocation`."""
    found = re.search(pattern.replace(_ACCOUNT, re.escape(account)), said)
    try:
        return (
            Allocation(
                account,
                float(found["used"].replace(",", "")),
                float(found["granted"].replace(",", "")),
                unit,
            )
            if found
            else None
        )
    except (ValueError, IndexError):
        return None
