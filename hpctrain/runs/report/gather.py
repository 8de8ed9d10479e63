"""Reads everything a report shows: each step of each log, each start of each job, and what they
cost. Pure but for reading.

A series longer than `MOST_POINTS` is thinned evenly as it is read, so a log of any size fits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpctrain.config import billing
from hpctrain.runs import cost
from hpctrain.runs.diagnose import Subject
from hpctrain.runs.records import RunRecords, read_run
from hpctrain.runs.starts import NO_END, Fate, Start, starts_of
from hpctrain.runs.status import RunStatus, status_of
from hpctrain.slurm.jobs import Answer
from hpctrain.triage.attempt import Attempt
from hpctrain.triage.judge import Diagnosis, in_order
from hpctrain.triage.records import Place, Step, median
from hpctrain.triage.thresholds import Thresholds

MOST_POINTS = 20_000
_SAVE_TIME_S = 120.0  # where no log tells how long a save takes


@dataclass
class Points:
    """Steps of all logs, evenly thinned: when it is full every second one is dropped and half as
    many are kept from then on."""

    most: int = MOST_POINTS
    rows: list[tuple[Attempt, Step, float | None]] = field(default_factory=list)
    every: int = 1
    _seen: int = 0

    def add(self, attempt: Attempt, step: Step, place: Place, time_s: float | None) -> None:
        self._seen += 1
        bad = step.loss is not None and not math.isfinite(step.loss)
        if bad or self._seen % self.every == 0:
            self.rows.append((attempt, step, time_s))
        if len(self.rows) >= self.most:
            self.rows = self.rows[::2]
            self.every *= 2


@dataclass(frozen=True)
class AttemptRow(Fate):
    """One start of a job with what it did. Iterations as logged; `lost` are those that the next
    start did again."""

    restart: int = 0
    first_iteration: int | None = None
    last_iteration: int | None = None
    kept_iterations: int = 0
    lost_iterations: int = 0
    step_time_s: float | None = None
    productive_s: float | None = None
    lost_s: float | None = None
    cause: str | None = None
    where: str = ""
    node: str | None = None
    bill: cost.Bill | None = None


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    run: RunRecords
    status: RunStatus
    diagnosis: Diagnosis
    points: Points
    rows: tuple[AttemptRow, ...]
    spent: cost.Spent | None
    cadence: Mapping[str, Any]
    made_s: float
    unseen: tuple[str, ...]

    @property
    def lost_s(self) -> float:
        return sum(row.lost_s or 0.0 for row in self.rows)

    @property
    def efficiency(self) -> float | None:
        """Time of iterations that count, over all time that jobs ran; None where neither is
        known."""
        timed = [row for row in self.rows if row.elapsed_s]
        productive = sum(row.productive_s or 0.0 for row in timed)
        return (
            productive / sum(row.elapsed_s or 0.0 for row in timed)
            if timed and productive
            else None
        )


def gather(run_dir: str, ask_slurm: bool = True, now_s: float | None = None) -> Report:
    """Read a run directory, however much of it there is. Raises EnvironmentFault when it is not
    there or a log cannot be read."""
    now_s = time.time() if now_s is None else now_s
    run = read_run(run_dir)
    subject = Subject(list(run.logs), Thresholds(), run, Answer({}, {}, ("Slurm was not asked",)))
    if ask_slurm:
        subject.ask_slurm()
    run, answer = subject.run or run, subject.slurm
    points = Points()
    subject.engine.on_step = points.add
    diagnosis = subject.diagnose()
    status = status_of(run, answer, now_s)
    attempts = in_order(subject.engine.attempts)
    starts = starts_of(run, answer, now_s)
    job = cost.full_job(run.plan)
    rows = attempt_rows(attempts, starts, job, diagnosis, status)
    unseen = [*status.unseen, *subject.unreadable]
    spent = None
    if job is not None:
        spent = cost.spent(run, answer, now_s)
        unseen += spent.unseen
    else:
        unseen.append("what a job costs: plan.json does not tell")
    return Report(
        run,
        status,
        diagnosis,
        points,
        tuple(rows),
        spent,
        cadence_of(run, attempts),
        now_s,
        tuple(dict.fromkeys(unseen)),
    )


def attempt_rows(
    attempts: Sequence[Attempt],
    starts: Sequence[Start],
    job: cost.Bill | None,
    diagnosis: Diagnosis,
    status: RunStatus,
) -> list[AttemptRow]:
    """Each start of each job, known from its log, from Slurm or from the records; oldest first."""
    logged = {(attempt.job_id or attempt.file, attempt.restart): attempt for attempt in attempts}
    timed = {(start.job_id, start.restart): start for start in starts}
    keys = list(dict.fromkeys([*timed, *logged]))
    keys.sort(key=lambda key: (int(key[0]) if key[0].isdigit() else 0, key[1]))
    causes = {
        (i.attempt.job_id or i.attempt.file, i.attempt.restart): i.event
        for i in diagnosis.incidents
    }
    out = []
    for index, key in enumerate(keys):
        attempt, start, event = logged.get(key), timed.get(key), causes.get(key)
        first, last = _span(attempt)
        following = next(
            (logged[k] for k in keys[index + 1 :] if k in logged and logged[k].num_steps), None
        )
        lost = _lost(last, following, status, attempt)
        done = last - first + 1 if first is not None and last is not None else 0
        step_s = (
            median(attempt.step_times.values)
            if attempt and attempt.step_times.values
            else _step_s(attempt, start)
        )
        elapsed = start.elapsed_s if start else None
        kept = max(done - lost, 0)
        out.append(
            AttemptRow(
                (start.link if start else None) or (attempt.link if attempt else None),
                key[0],
                start.state if start and start.state != NO_END else "",
                (attempt.mode if attempt else None) or (start.mode if start else None),
                start.start_s if start else None,
                start.end_s if start else None,
                elapsed,
                restart=key[1],
                first_iteration=first,
                last_iteration=last,
                kept_iterations=kept,
                lost_iterations=min(lost, done),
                step_time_s=step_s,
                productive_s=_at_most(kept * step_s, elapsed) if step_s else None,
                lost_s=min(lost, done) * step_s if step_s else None,
                cause=event.failure if event else None,
                where=str(event.place) if event else "",
                node=event.node if event else None,
                bill=cost.used_by(job, elapsed, "") if job and elapsed is not None else None,
            )
        )
    return out


def _at_most(value: float, limit: float | None) -> float:
    return value if limit is None else min(value, limit)


def _span(attempt: Attempt | None) -> tuple[int | None, int | None]:
    if attempt is None or attempt.first is None or attempt.last is None:
        return None, None
    return attempt.first.iteration, attempt.last.iteration


def _lost(
    last: int | None, following: Attempt | None, status: RunStatus, attempt: Attempt | None
) -> int:
    """Iterations done again by the next start, or, for the last start, those after the newest
    complete checkpoint."""
    if last is None:
        return 0
    if (
        following is not None
        and following.first is not None
        and following.first.iteration is not None
    ):
        return max(last - following.first.iteration + 1, 0)
    if following is None and not status.live and attempt is not None and not attempt.reached_end:
        saved = status.progress.checkpoint_iteration
        return max(last - saved, 0) if saved is not None and saved <= last else 0
    return 0


def _step_s(attempt: Attempt | None, start: Start | None) -> float | None:
    """Seconds an iteration from the log's own clock, where no line tells it."""
    if attempt is None or attempt.first is None or attempt.last is None:
        return None
    begin, end = attempt.first_step_time_s, attempt.last_step_time_s
    count = (attempt.last.iteration or 0) - (attempt.first.iteration or 0)
    return (
        (end - begin) / count
        if begin is not None and end is not None and end > begin and count > 0
        else None
    )


def cadence_of(run: RunRecords, attempts: Sequence[Attempt]) -> dict[str, Any]:
    """How often the run saves, in seconds, against the interval that loses least (Young 1974, Daly
    2006)."""
    job = run.section("job")
    steps = [value for attempt in attempts for value in attempt.step_times.values]
    planned = job.get("step_time_s")
    expected = planned if isinstance(planned, (int, float)) else None
    step_s = median(steps) if steps else expected
    every, nodes = job.get("save_every"), job.get("num_nodes")
    interval = every * step_s if isinstance(every, int) and step_s else None
    if not isinstance(nodes, int) or nodes < 1:
        return {"interval_s": interval, "best_s": None, "save_every": every}
    mttf = billing.mean_time_to_failure_s(nodes)
    measured = [value for attempt in attempts for value in attempt.save_times.values]
    save_s = max(median(measured), 0.1) if measured else _SAVE_TIME_S
    best = billing.young_daly_s(save_s, mttf)
    return {
        "save_every": every,
        "interval_s": interval,
        "best_s": best,
        "mttf_s": mttf,
        "save_time_s": save_s,
        "save_measured": bool(measured),
        "best_iterations": max(round(best / step_s), 1) if step_s else None,
    }
