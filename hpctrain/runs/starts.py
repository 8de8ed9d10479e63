"""The one history of a run: its jobs and their starts, by ledger, links.jsonl, logs and Slurm.

A job starts once, and once more each time it is put back into the queue. Status, cost, report,
logs, triage, bad nodes and chain all read this, so that they tell the same. Slurm's account of a
start wins where there is one; what it does not tell, or where nobody could be asked, the run
directory tells.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpctrain.runs.records import RunRecords
from hpctrain.runtime.history import RUN_MODES
from hpctrain.slurm.jobs import Answer, Job, node_names, parse_time
from hpctrain.triage.records import job_of_log, utc

NO_END = "began, no end recorded"
# What a guard that let nothing train decided, as a state.
_DECIDED = {"done": "nothing left to do", "stopped": "stopped", "gave_up": "gave up"}
_CLOCKS_DIFFER_S = 60.0  # between a batch host and slurmctld, at most


@dataclass(frozen=True)
class Fate:
    """What became of a start of a job, or of the job. Times are UTC seconds since 1970. `state` is
    Slurm's word in capitals where Slurm told it, else what the run directory tells."""

    link: int | None
    job_id: str
    state: str
    mode: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    elapsed_s: float | None = None
    nodes: tuple[str, ...] = ()
    num_nodes: int | None = None
    iteration_from: int | None = None
    iteration_to: int | None = None
    checkpoint: str | None = None
    exit_code: int | None = None
    reason: str = ""
    active: bool = False


@dataclass(frozen=True)
class Start(Fate):
    """One start of a job: a link, or the same link again after a requeue.

    `source` says who told the state. `exit_code` is the step's own where it is on record. `found`
    is what the guard found before it let the start train.
    """

    restart: int = 0
    source: str = ""
    signal: int | None = None
    found: tuple[str, ...] = ()
    recorded: bool = False  # its end, by the guard: then the exit code is the step's
    ended: bool = False  # on record or by Slurm

    @property
    def trained(self) -> bool:
        """Whether the guard let it train."""
        return self.mode in RUN_MODES

    @property
    def by_slurm(self) -> bool:
        """Whether Slurm told how it ended, or that it runs."""
        return self.source in _BY_SLURM

    @property
    def name(self) -> str:
        return (
            f"job {self.job_id}" if self.link is None else f"link {self.link} (job {self.job_id})"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "link": self.link,
            "job_id": self.job_id,
            "restart": self.restart,
            "state": self.state,
            "mode": self.mode,
            "exit_code": self.exit_code,
            "start": utc(self.start_s),
            "end": utc(self.end_s),
            "elapsed_s": self.elapsed_s,
            "source": self.source,
        }


_BY_SLURM = ("sacct", "squeue", "squeue+sacct")


@dataclass(frozen=True)
class JobHistory:
    """A job of the run, with its starts, oldest first. `slurm` is its newest state where Slurm told
    one.
    """

    job_id: str
    link: int | None
    submitted: bool  # by hpctrain, on record in the ledger
    cancelled: bool
    cancelled_by: str  # by which command of a person; empty where a link did it
    slurm: Job | None
    starts: tuple[Start, ...]


def starts_of(run: RunRecords, answer: Answer | None = None, now_s: float = 0.0) -> list[Start]:
    """Every start of every job of the run, in the order of `jobs_of`."""
    return [start for job in jobs_of(run, answer, now_s) for start in job.starts]


def jobs_of(run: RunRecords, answer: Answer | None = None, now_s: float = 0.0) -> list[JobHistory]:
    """Every job that the ledger, links.jsonl or a log names, by link number and job id.

    Jobs of no link come last. `answer` is what Slurm told of them, `now_s` (UTC seconds) how late
    it is for the running ones.
    """
    answer = answer or Answer({}, {})
    links = links_of(run)
    events = {(str(record.get("job_id")), record.get("event")): record for record in run.ledger}
    counts_on = run.section("guard").get("counter") == "greatest_folder"
    logs = {job_of_log(path): path for path in run.logs}
    records: dict[str, list[Mapping[str, Any]]] = {}
    for record in run.links:
        records.setdefault(str(record.get("job_id")), []).append(record)
    jobs = []
    for job_id in run.job_ids():
        newest = answer.jobs.get(job_id)
        told = [*answer.earlier.get(job_id, ()), *([newest] if newest else ())]
        first = Start(links.get(job_id), job_id, NO_END, source="links.jsonl")
        starts = _starts(
            first, records.get(job_id, ()), list(filter(_began, told)), counts_on, now_s
        )
        starts = [_own_iterations(start, run.offset) for start in starts]
        queued, cancelled = (job_id, "submitted") in events, events.get((job_id, "cancelled"))
        by = str(cancelled.get("reason") or "") if cancelled else ""
        starts = _bounded(starts, logs.get(job_id))
        jobs.append(
            JobHistory(job_id, first.link, queued, bool(cancelled), by, newest, tuple(starts))
        )
    return sorted(jobs, key=lambda job: (job.link is None, job.link or 0, _numbers(job.job_id)))


def links_of(run: RunRecords) -> dict[str, int]:
    """Job id -> link number, from the ledger and links.jsonl."""
    records = [
        record for record in (*run.links, *run.ledger) if isinstance(record.get("link"), int)
    ]
    return {str(record["job_id"]): record["link"] for record in records if record.get("job_id")}


def _began(job: Job) -> bool:
    """Whether this is a start: not a wait, and not the end of a job that never began."""
    never = job.state == "CANCELLED" and not job.nodes and job.start_s == job.end_s
    return not job.pending and not never and (job.start_s is not None or bool(job.elapsed_s))


def _starts(
    like: Start,
    records: Sequence[Mapping[str, Any]],
    told: Sequence[Job],
    counts_on: bool,
    now_s: float,
) -> list[Start]:
    """The starts of the job that `like` is of, from the guard's records and from what Slurm
    told."""
    begins, ends = _by_restart(records, "begin"), _by_restart(records, "end")
    by_slurm = dict(zip(_restarts(begins, told), told))
    starts = []
    for restart in sorted({*begins, *by_slurm}):
        start = replace(like, restart=restart)
        if restart in begins:
            start = _recorded(start, begins[restart], ends.get(restart), counts_on)
        if restart in by_slurm:
            start = _accounted(start, by_slurm[restart], now_s)
        starts.append(start)
    return starts


def _by_restart(records: Sequence[Mapping[str, Any]], event: str) -> dict[int, Mapping[str, Any]]:
    """Restart number -> the last such record of a job."""
    return {int(one.get("restart") or 0): one for one in records if one.get("event") == event}


def _restarts(begins: Mapping[int, Mapping[str, Any]], told: Sequence[Job]) -> list[int]:
    """The restart number of each start that Slurm tells, oldest first.

    Slurm's accounts have none. Where the guard recorded a begin within the time of a start, it is
    that one's; the others are counted on from the one before. So neither a start that never reached
    the guard nor one that accounting has forgotten shifts the rest.
    """
    numbers: list[int] = []
    for job in told:
        least = numbers[-1] + 1 if numbers else 0
        near = []
        for restart, record in begins.items():
            time_s = parse_time(record.get("time"))
            if restart >= least and time_s is not None and _within(time_s, job):
                near.append((abs(time_s - (job.start_s or time_s)), restart))
        numbers.append(min(near)[1] if near else least)
    return numbers


def _within(time_s: float, job: Job) -> bool:
    """Whether a guard that wrote at `time_s` may be this start's."""
    if job.start_s is None or time_s < job.start_s - _CLOCKS_DIFFER_S:
        return False
    return job.running or job.end_s is None or time_s <= job.end_s + _CLOCKS_DIFFER_S


def _recorded(
    start: Start, begin: Mapping[str, Any], end: Mapping[str, Any] | None, counts_on: bool
) -> Start:
    """The start as the guard recorded its begin, and its end where it came to one."""
    mode = begin.get("mode")
    reason = str((end or begin).get("reason") or "")
    nodes = node_names(begin.get("nodes"))
    start = replace(
        start,
        mode=mode,
        start_s=parse_time(begin.get("time")),
        nodes=nodes,
        num_nodes=len(nodes) or None,
        iteration_from=begin.get("iteration") if mode in RUN_MODES else None,
        checkpoint=(end or begin).get("checkpoint"),
        reason=reason,
        found=tuple(str(begin.get("reason") or "").split("; ")[1:]) if mode in RUN_MODES else (),
        state=NO_END if mode in RUN_MODES or not mode else _DECIDED.get(mode, mode),
    )
    if mode == "finetune" and not counts_on:
        # The number of its start checkpoint is another run's: this one counts from 0.
        start = replace(start, iteration_from=0)
    if end is None:
        return start
    end_s = parse_time(end.get("time"))
    return replace(
        start,
        recorded=True,
        ended=True,
        state=f"ended with exit code {end.get('exit_code')}",
        exit_code=end.get("exit_code"),
        iteration_to=end.get("iteration"),
        end_s=end_s,
        elapsed_s=_between(start.start_s, end_s),
    )


def _own_iterations(start: Start, offset: int) -> Start:
    """The start with the run's own iterations, of numbers that are `offset` ahead of them."""
    first, last = (
        None if number is None else max(number - offset, 0)
        for number in (start.iteration_from, start.iteration_to)
    )
    return replace(start, iteration_from=first, iteration_to=last)


def _accounted(start: Start, job: Job, now_s: float) -> Start:
    """The start with what Slurm tells of it."""
    start_s = job.start_s if job.start_s is not None else start.start_s
    if job.running:
        end_s, elapsed_s = None, _between(start_s, now_s)
    else:
        end_s = job.end_s if job.end_s is not None else start.end_s
        elapsed_s = _between(start_s, end_s) if job.elapsed_s is None else float(job.elapsed_s)
    return replace(
        start,
        state=job.state,
        source=job.source,
        start_s=start_s,
        end_s=end_s,
        elapsed_s=elapsed_s,
        nodes=job.nodes or start.nodes,
        num_nodes=job.num_nodes or start.num_nodes,
        exit_code=start.exit_code if start.recorded or job.running else job.exit_code,
        signal=None if job.running else job.signal,
        active=job.running,
        ended=not job.running,
    )


def _bounded(starts: list[Start], log: str | None) -> list[Start]:
    """The starts of a job with an end also for those of which nobody told one, where something
    bounds it.

    An earlier start lasted at most until the next one; the last one at least until its log was last
    written.
    """
    for index, start in enumerate(starts[:-1]):
        following = starts[index + 1].start_s
        if start.elapsed_s is None and start.start_s is not None and following is not None:
            took = _between(start.start_s, following)
            state = start.state if start.by_slurm else "ended by Slurm"
            starts[index] = replace(start, end_s=following, elapsed_s=took, state=state)
    if starts and starts[-1].elapsed_s is None and not starts[-1].active:
        last = starts[-1]
        written = _last_written(log) if log else None
        if written is not None and last.start_s is not None and written >= last.start_s:
            took = _between(last.start_s, written)
            starts[-1] = replace(last, end_s=written, elapsed_s=took, source="log")
    return starts


def _between(start_s: float | None, end_s: float | None) -> float | None:
    """Seconds from one to the other, never negative: they may be of two clocks."""
    return None if start_s is None or end_s is None else max(end_s - start_s, 0.0)


def _last_written(path: str) -> float | None:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return None


def _numbers(job_id: str) -> tuple[int, ...]:
    return tuple(map(int, job_id.split("_")))


def measured_step_time_s(starts: Sequence[Start]) -> float | None:
    """Seconds an iteration took in the starts whose end is on record, start-up included; None
    without one.

    A begin and its end come from one host, so the difference of their times is right whatever its
    clock says.
    """
    seconds = iterations = 0.0
    for start in starts:
        if start.trained and start.elapsed_s and start.iteration_to is not None:
            done = start.iteration_to - (start.iteration_from or 0)
            if done > 0:
                seconds, iterations = seconds + start.elapsed_s, iterations + done
    return seconds / iterations if iterations else None
