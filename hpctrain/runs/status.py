"""What a run is doing: the run directory, squeue and sacct put together, each of them optional.

Two squeue calls and one sacct call serve any number of runs and links. Whatever could not be asked
is named in `unseen`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpctrain.config import billing
from hpctrain.runs.live import ask
from hpctrain.runs.records import SUBMISSION, RunRecords, by_hand, read_run
from hpctrain.runs.starts import NO_END, Fate, JobHistory, Start, jobs_of
from hpctrain.runtime.files import open_state
from hpctrain.runtime.history import RUN_MODES
from hpctrain.slurm.jobs import Answer
from hpctrain.triage.failures import FAILURES
from hpctrain.triage.records import Event, distinct, job_of_log, utc

NOT_SUBMITTED, PENDING, RUNNING, DONE, STOPPED, GAVE_UP, FAILED, ENDED, UNKNOWN = (
    "not submitted",
    "pending",
    "running",
    "done",
    "stopped",
    "gave up",
    "failed",
    "ended",
    "unknown",
)
_TAIL = 512 * 1024  # bytes of the newest log that tell the last iteration and step time


# bytes of a failed link's log, and links, that tell why in the table
_CAUSE_TAIL, _MOST_CAUSES = (64 * 1024, 50)
_FAILED_STATES = (
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "CANCELLED",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)


@dataclass(frozen=True)
class LinkStatus(Fate):
    """One link. Iterations count completed checkpoints for ended links, log lines for a running
    one. `start_s` is the first start, `elapsed_s` the time of all `starts` together."""

    starts: tuple[Start, ...] = ()
    expected_start_s: float | None = None
    limit_s: float | None = None  # when a running one is ended by Slurm
    pending: bool = False
    stuck: str = ""  # what keeps it waiting until a person acts
    release: str = ""  # the command that changes that

    @property
    def restarts(self) -> int:
        """How often Slurm started it again."""
        return max((start.restart for start in self.starts), default=0)

    def as_json(self) -> dict[str, Any]:
        return {
            "link": self.link,
            "job_id": self.job_id,
            "state": self.state,
            "mode": self.mode,
            "restarts": self.restarts,
            "nodes": list(self.nodes),
            "num_nodes": self.num_nodes,
            "iteration_from": self.iteration_from,
            "iteration_to": self.iteration_to,
            "checkpoint": self.checkpoint,
            "exit_code": self.exit_code,
            "reason": self.reason,
            "start": utc(self.start_s),
            "end": utc(self.end_s),
            "elapsed_s": self.elapsed_s,
            "expected_start": utc(self.expected_start_s),
            "limit": utc(self.limit_s),
            "stuck": self.stuck,
            "release": self.release,
            "starts": [start.as_json() for start in self.starts],
        }


@dataclass(frozen=True)
class Progress:
    """How far a run is. `eta_s` is time of running still needed, without the time in the queue.

    Iterations are the run's own; the numbers of checkpoints are `offset` ahead of them.
    """

    iteration: int | None = None
    target: int | None = None
    step_time_s: float | None = None
    eta_s: float | None = None
    links_needed: int | None = None
    checkpoint: str | None = None
    checkpoint_iteration: int | None = None
    offset: int = 0

    @property
    def unsaved(self) -> int | None:
        """Iterations since the newest complete checkpoint; None where it is not known."""
        if self.iteration is None:
            return None
        return max(self.iteration - (self.checkpoint_iteration or 0), 0)

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class RunStatus:
    """Everything `status` shows of one run."""

    run: RunRecords
    state: str
    links: tuple[LinkStatus, ...]
    progress: Progress
    unseen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def live(self) -> bool:
        return self.state in (PENDING, RUNNING)

    def as_json(self) -> dict[str, Any]:
        return {
            "run": self.run.name,
            "run_dir": self.run.run_dir,
            "state": self.state,
            "site": self.run.plan.get("site"),
            "recipe": self.run.recipe,
            "links": [link.as_json() for link in self.links],
            "progress": self.progress.as_json(),
            "notes": list(self.notes),
            "unseen": list(self.unseen),
        }


def observe(
    run_dirs: Sequence[str],
    ask_slurm: bool = True,
    now_s: float | None = None,
    read_logs: bool = True,
) -> list[RunStatus]:
    """The status of each run, in the order given, with two squeue calls at most and one sacct call
    for all of them."""
    now_s = time.time() if now_s is None else now_s
    runs = [read_run(run_dir) for run_dir in run_dirs]
    if ask_slurm:
        runs, answer = ask(runs)
    else:
        submitted = any(run.job_ids() for run in runs)
        answer = Answer({}, {}, ("Slurm was not asked",) if submitted else ())
    return [status_of(run, answer, now_s, read_logs) for run in runs]


def status_of(run: RunRecords, answer: Answer, now_s: float, read_logs: bool = True) -> RunStatus:
    """The status of one run from its records and Slurm's answer. Reads the tail of its newest log
    and its checkpoint folder."""
    tail = _tail_of_log(run.logs[-1]) if read_logs and run.logs else {}
    if read_logs and len(run.logs) > 1 and not tail.get("step_time_s"):
        # A link that has just begun has not told yet; the one before it is the same program on as
        # many nodes.
        tail = {**tail, "step_time_s": _tail_of_log(run.logs[-2]).get("step_time_s")}
    tails = {tail["job_id"]: tail} if tail.get("job_id") else {}
    jobs = jobs_of(run, answer, now_s)
    if read_logs:
        silent = _without_end(run, jobs).items()
        tails.update((job_id, _tail_of_log(path)) for job_id, path in silent if job_id not in tails)
    links = tuple(_links(jobs, tails))
    if read_logs:
        links = tuple(_with_causes(run, links))
    unseen = [*run.unseen, *answer.unseen, *answer.forgotten(run.job_ids(), run.ended_jobs())]
    checkpoint, number = _newest_checkpoint(run, unseen) if read_logs else (None, None)
    progress = _progress(run, links, tail, checkpoint, number)
    if not run.job_ids():
        unseen = [what for what in unseen if "is not there" not in what]
    return RunStatus(
        run,
        overall_state(run, links, progress),
        links,
        progress,
        tuple(unseen),
        tuple(_notes(run, links, progress)),
    )


def _without_end(run: RunRecords, jobs: Sequence[JobHistory]) -> dict[str, str]:
    """Job id -> log of the jobs whose end neither Slurm nor links.jsonl tells: their logs may."""
    silent = {
        job.job_id
        for job in jobs
        if job.slurm is None and not any(start.ended for start in job.starts)
    }
    return {job_id: path for path in run.logs if (job_id := job_of_log(path)) and job_id in silent}


def _links(jobs: Sequence[JobHistory], tails: Mapping[str, Mapping[str, Any]]) -> list[LinkStatus]:
    """One status a job, by link number and job id; jobs that only a log or Slurm knows come too."""
    out = [_link(job) for job in jobs]
    # A link that never wrote its end reached what the next one started from.
    for index, link in enumerate(out):
        following = out[index + 1] if index + 1 < len(out) else None
        if link.iteration_to is None and following and following.iteration_from is not None:
            link = replace(link, iteration_to=following.iteration_from)
        if jobs[index].cancelled and not jobs[index].starts:
            link = replace(link, reason=jobs[index].cancelled_by or _not_needed(out[:index]))
        out[index] = _by_its_log(link, tails.get(link.job_id, {}))
    return out


_NOT_NEEDED = {
    "done": "found nothing left to do",
    "stopped": "stopped, as asked",
    "gave_up": "gave up",
}


def _not_needed(before: Sequence[LinkStatus]) -> str:
    """Which link before a cancelled one made it superfluous."""
    by = next((link for link in reversed(before) if link.mode in _NOT_NEEDED), None)
    return f"not needed: link {by.link} {_NOT_NEEDED[by.mode or '']}" if by else ""


def _by_its_log(link: LinkStatus, tail: Mapping[str, Any]) -> LinkStatus:
    """The link with what only the end of its log tells: how it ended, or how far it is."""
    if link.state in (NO_END, UNKNOWN) and tail.get("end"):
        why = "; ".join(filter(None, ["by its log", link.reason]))
        link = replace(link, state=tail["end"], exit_code=tail.get("exit_code"), reason=why)
    if link.active and tail.get("iteration") is not None:
        link = replace(link, iteration_to=tail["iteration"])
    return link


def _link(job: JobHistory) -> LinkStatus:
    """What became of a job, from its starts and from what Slurm says of it now."""
    first, last = (job.starts[0], job.starts[-1]) if job.starts else (None, None)
    times = [start.elapsed_s for start in job.starts if start.elapsed_s is not None]
    notes = "; ".join(distinct(note for start in job.starts for note in start.found))
    pending = bool(job.slurm and job.slurm.pending)
    stuck, release = job.slurm.stuck if job.slurm else ("", "")
    link = LinkStatus(
        job.link,
        job.job_id,
        _state(job),
        starts=job.starts,
        expected_start_s=job.slurm.expected_start_s if job.slurm else None,
        limit_s=job.slurm.end_s if job.slurm and job.slurm.running else None,
        reason=job.slurm.reason if job.slurm else "",
        elapsed_s=sum(times) if times else None,
        pending=pending,
        stuck=stuck,
        release=release,
    )
    if first is None or last is None:
        return link
    # Of a guard that let nothing train Slurm knows an exit code, and its record why.
    decided = bool(last.mode) and not last.trained and not pending
    told = link.reason or last.reason * (not pending)
    reason = last.reason if decided else told
    return replace(
        link,
        mode=next((start.mode for start in reversed(job.starts) if start.mode), None),
        nodes=last.nodes,
        num_nodes=last.num_nodes,
        iteration_from=next((start.iteration_from for start in job.starts if start.trained), None),
        iteration_to=last.iteration_to,
        checkpoint=last.checkpoint,
        exit_code=None if pending else last.exit_code,
        reason="; ".join(filter(None, [_plain_reason(reason, last.exit_code), notes])),
        start_s=first.start_s,
        end_s=None if pending else last.end_s,
        active=last.active,
    )


def _state(job: JobHistory) -> str:
    """Slurm's word where there is one, else what the records tell."""
    if job.slurm is not None:
        return job.slurm.state
    if job.cancelled and not any(start.ended for start in job.starts):
        return "CANCELLED"
    if job.starts:
        return job.starts[-1].state
    return "submitted" if job.submitted else UNKNOWN


def _plain_reason(reason: str, code: int | None) -> str:
    """Without what the state or the decision says already."""
    if reason == "NonZeroExitCode":
        return "" if code is None else f"exit code {code}"
    return "" if reason in ("None", f"exit code {code}") else reason


def overall_state(run: RunRecords, links: Sequence[LinkStatus], progress: Progress) -> str:
    """One word for the run, from its links: what runs now wins, then what waits, then how the last
    one ended."""
    if any(link.active for link in links):
        return RUNNING
    if any(link.pending for link in links):
        return PENDING
    if not links:
        return NOT_SUBMITTED
    modes = [link.mode for link in links if link.mode]
    # Ended links count checkpoints, so they tell also where the checkpoint folder cannot be seen.
    saved = max(
        [
            progress.checkpoint_iteration or 0,
            *(link.iteration_to or 0 for link in links if link.exit_code == 0),
        ]
    )
    reached = progress.target is not None and saved >= progress.target
    if "done" in modes or reached:
        return DONE
    if modes and modes[-1] == "gave_up":
        return GAVE_UP
    if modes and modes[-1] == "stopped":
        return FAILED if _died(links) else STOPPED
    if any(link.state == "submitted" for link in links):
        return UNKNOWN  # it may be queued: Slurm could not be asked, or has forgotten it
    started = [link for link in links if link.mode or link.exit_code is not None]
    last = started[-1] if started else links[-1]
    if last.state == "COMPLETED" or last.exit_code == 0:
        if run.stop and run.section("guard").get("layout") != "none":
            return STOPPED
        return DONE if progress.target is None else ENDED
    if last.exit_code not in (0, None) or last.state in _FAILED_STATES:
        return FAILED
    return UNKNOWN


def _died(links: Sequence[LinkStatus]) -> bool:
    """Whether the newest link that trained ended by a failure of its own."""
    trained = [link for link in links if link.mode in RUN_MODES]
    ended = trained[-1] if trained else None
    by_slurm = ended is not None and ended.state in ("TIMEOUT", "CANCELLED", "PREEMPTED")
    return ended is not None and not by_slurm and ended.exit_code not in (0, None)


def _progress(
    run: RunRecords,
    links: Sequence[LinkStatus],
    tail: Mapping[str, Any],
    checkpoint: str | None,
    number: int | None,
) -> Progress:
    job, guard = run.section("job"), run.section("guard")
    target = _whole(guard.get("target"))
    target = target - run.offset if target else None
    target = target or _whole(job.get("iterations")) or _whole(tail.get("total"))
    number = None if number is None else max(number - run.offset, 0)
    running = any(link.active for link in links)
    if not running and _went_back(run, number):
        iteration = number
    else:
        latest = _latest(links)
        known = [value for link in latest for value in (link.iteration_from, link.iteration_to)]
        known += [number, tail.get("iteration")]
        iteration = max((value for value in known if value is not None), default=None)
    step_s = tail.get("step_time_s") or job.get("step_time_s")
    step_s = float(step_s) if isinstance(step_s, (int, float)) and step_s > 0 else None
    eta_s = needed = None
    base = iteration if running or number is None else number
    if target and base is not None and step_s:
        left = max(target - base, 0)
        eta_s = left * step_s
        needed = links_needed(job, left, step_s) if left else 0
    return Progress(iteration, target, step_s, eta_s, needed, checkpoint, number, run.offset)


def links_needed(job: Mapping[str, Any], left: int, step_s: float) -> int | None:
    """How many links so many iterations take, by the `job` of plan.json; None where no link would
    reach a checkpoint, or the time of a job is not known."""
    time_s, signal = _whole(job.get("time_s")), job.get("signal")
    lead_s = _whole(signal.get("lead_s")) if isinstance(signal, Mapping) else None
    saves, every = bool(job.get("saves_on_signal")), _whole(job.get("save_every"))
    lead_s = (lead_s or 0) if saves else 0
    return billing.links_needed(left, step_s, every, time_s, lead_s, saves) if time_s else None


def _latest(links: Sequence[LinkStatus]) -> list[LinkStatus]:
    """The link that began last: one before it may have come further, and somebody gone back since.
    All of them where no time is known."""
    begun = [link for link in links if link.start_s is not None]
    return [max(begun, key=lambda link: link.start_s or 0.0)] if begun else list(links)


def _went_back(run: RunRecords, number: int | None) -> bool:
    """Whether a start ended with a newer checkpoint than the newest that is there now: somebody
    went back, and what was trained since counts no more."""
    ended = (_whole(end.get("iteration")) for end in run.links if end.get("event") == "end")
    newest = max((at for at in ended if at), default=0) - run.offset
    return number is not None and number < newest


def _newest_checkpoint(run: RunRecords, unseen: list[str]) -> tuple[str | None, int | None]:
    """The newest complete checkpoint by the guard's own rules; nothing when the folder cannot be
    seen from here."""
    from hpctrain.runtime import sidecar
    from hpctrain.runtime.settings import GuardError, read_settings
    from hpctrain.runtime.survey import Survey

    folder = run.section("guard").get("checkpoint_dir")
    if not isinstance(folder, str) or not folder:
        return None, None
    if not os.path.isdir(folder):
        unseen.append(f"the checkpoint folder {folder} is not there (yet)")
        return None, None
    try:
        survey = Survey(read_settings(run.run_dir))
        found = survey.newest_complete()
        if not found and survey.place and sidecar.last_act(survey.place):
            return None, run.offset  # gone back to the start, or to nothing
    except (OSError, GuardError, ValueError, KeyError) as error:
        unseen.append(f"the checkpoint folder {folder}: {error}")
        return None, None
    return (found.name, found.number) if found else (None, None)


def _with_causes(run: RunRecords, links: Sequence[LinkStatus]) -> list[LinkStatus]:
    """Failed links with what the end of their logs says was the cause, in a few words; only the
    last so many are read."""
    logs = {job_id: path for path in run.logs if (job_id := job_of_log(path))}
    failed = {
        link.job_id
        for link in links
        if link.exit_code not in (0, None) or link.state in (*_FAILED_STATES, NO_END)
    }
    wanted = {link.job_id for link in links if link.job_id in failed or link.restarts} & set(logs)
    newest = sorted(wanted, key=lambda job_id: tuple(map(int, job_id.split("_"))))[-_MOST_CAUSES:]
    return [
        _with_cause(run, link, logs[link.job_id], link.job_id in failed)
        if link.job_id in newest
        else link
        for link in links
    ]


def _with_cause(run: RunRecords, link: LinkStatus, log: str, failed: bool) -> LinkStatus:
    """The link with what the end of its log says of its end, where it failed, and of its earlier
    starts."""
    from hpctrain.triage.cause import causes_of
    from hpctrain.triage.engine import Engine
    from hpctrain.triage.rules import Circumstances

    engine = Engine(tasks_per_node=run.tasks_per_node)
    _read_tail(engine, log, _CAUSE_TAIL)
    attempts = engine.attempts
    # Whether a job without an end on record still runs, only Slurm knows.
    unknown = link.active or link.pending or link.state == NO_END
    around = Circumstances(running=None if unknown else False)
    causes = causes_of(attempts, around, attempts[-1]) if attempts else {}
    told = [
        f"before restart {later.restart}: {words}"
        for attempt, later in zip(attempts, attempts[1:])
        if (words := _in_words(causes[id(attempt)]))
    ]
    if attempts and (link.state == NO_END or (failed and not unknown)):
        told = [_in_words(causes[id(attempts[-1])]), *told]
    why = link.reason
    if any(told) and why.startswith("by its log"):
        why = why[len("by its log") :].lstrip("; ")
    return replace(link, reason="; ".join(filter(None, [*told, why])))


def _in_words(cause: Event | None) -> str:
    """What failed and where, for a table; empty where nothing is known."""
    if cause is None or cause.failure == "unknown":
        return ""
    rank = "" if cause.rank is None else f" on rank {cause.rank}"
    where = f" on {cause.node}" if cause.node else rank
    return FAILURES[cause.failure].title + where


def _read_tail(engine: Any, path: str, num_bytes: int) -> None:
    """Feed an engine the end of a log; nothing where it cannot be read."""
    try:
        with open(path, "rb", opener=open_state) as file:
            file.seek(max(os.fstat(file.fileno()).st_size - num_bytes, 0))
            reader = engine.log(path)
            reader.feed(file.read(num_bytes))
            reader.close()
    except OSError:
        return


def _tail_of_log(path: str) -> dict[str, Any]:
    """The last iteration, total and step time that the end of a log tells, and the job it is of."""
    from hpctrain.triage.engine import Engine
    from hpctrain.triage.records import median

    engine = Engine()
    _read_tail(engine, path, _TAIL)
    trained = [attempt for attempt in engine.attempts if attempt.num_steps and attempt.last]
    if not trained:
        newest = engine.attempts[-1] if engine.attempts else None
        return (
            {"job_id": newest.job_id, "end": _end_of(newest), "exit_code": newest.exit_code}
            if newest
            else {}
        )
    last = trained[-1]
    assert last.last is not None
    times = last.step_times.last()
    return {
        "end": _end_of(engine.attempts[-1]) if engine.attempts[-1].job_id == last.job_id else None,
        "exit_code": (
            engine.attempts[-1].exit_code if engine.attempts[-1].job_id == last.job_id else None
        ),
        "job_id": last.job_id,
        "iteration": last.last.iteration,
        "total": last.total,
        "step_time_s": median(times) if times else None,
    }


def _end_of(attempt: Any) -> str | None:
    """How a log's last attempt ended, where it tells: Slurm's word for the reason, or the exit
    code."""
    from hpctrain.triage.cause import find_cause
    from hpctrain.triage.rules import Circumstances

    words = {
        "time_limit": "TIMEOUT",
        "node": "NODE_FAIL",
        "cancelled": "CANCELLED",
        "preemption": "PREEMPTED",
        "script_killed": "FAILED",
    }
    cause = find_cause(attempt, Circumstances())
    if (
        cause is not None
        and FAILURES[cause.failure].external
        or cause is not None
        and cause.failure == "node"
    ):
        return words[cause.failure]
    if attempt.exit_code is not None:
        return f"ended with exit code {attempt.exit_code}"
    return "FAILED" if cause is not None else None


def stop_words(run: RunRecords, links: Sequence[LinkStatus], progress: Progress) -> list[str]:
    """What STOP makes of each running link, until when it goes on, and what `cancel` would lose."""
    out = []
    for link in (link for link in links if link.active):
        limit = f"its time limit, {utc(link.limit_s)}" if link.limit_s else "its time limit"
        lost = progress.unsaved
        loses = f"would lose {lost} iterations" if lost is not None else "ends it now"
        ends = "ends after its next checkpoint"
        if run.section("guard").get("layout") == "none":
            ends = "goes on to its own end, since nothing tells its checkpoints"
        out.append(f"job {link.job_id} {ends}, at the latest at {limit}; `hpctrain cancel` {loses}")
    return [*out, "links that wait end as they start"]


def _notes(run: RunRecords, links: Sequence[LinkStatus], progress: Progress) -> list[str]:
    out = []
    if run.stop:
        out += ["the STOP file is there", *stop_words(run, links, progress)]
    newest = {
        (record.get("link"), record.get("kind")): record.get("event")
        for record in run.ledger
        if record.get("event") in SUBMISSION
    }
    unfinished = {link for (link, _), event in newest.items() if event == "submitting"}
    if unfinished:
        listed = ", ".join(str(link) for link in sorted(unfinished, key=str))
        out.append(
            f"link {listed} was being submitted when that was cut off; `hpctrain chain` finds out"
            " whether it is queued"
        )
    out += [
        f"job {job_id} is none that `hpctrain chain` queued: job.sbatch was submitted by hand"
        for job_id in by_hand(run)
    ]
    out += [
        _preflight_note(record)
        for record in run.links
        if record.get("event") == "preflight" and record.get("bad")
    ]
    watched = [record for record in run.links if record.get("event") == "watch"][-1:]
    out += [
        f"the watcher of link {record.get('link')} at {record.get('time')}: {record.get('mode')},"
        f" {record.get('reason')}"
        for record in watched
    ]
    out += [f"job {link.job_id} waits for you: {link.release}" for link in links if link.release]
    return out


_AFTER_PREFLIGHT = {
    "requeue": "the job went back into the queue without them",
    "stop": "the job ended before training",
    "go": "it trained all the same",
}


def _preflight_note(record: Mapping[str, Any]) -> str:
    bad = record["bad"] if isinstance(record["bad"], Mapping) else {}
    named = "; ".join(
        f"{node}: {', '.join(map(str, why))}" for node, why in bad.items() if isinstance(why, list)
    )
    after = _AFTER_PREFLIGHT.get(str(record.get("action")), "")
    return f"the preflight of job {record.get('job_id')} found bad nodes ({named}); {after}"


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
