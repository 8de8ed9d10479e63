"""From everything that was read to one answer: the cause, what to do next, and every rule's verdict."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpctrain.triage import rules
from hpctrain.triage.attempt import Attempt
from hpctrain.triage.engine import Engine
from hpctrain.triage.failures import CONTINUE, EXCLUDE, FAILURES, LOOK, RETRY, STOP, advise, knobs
from hpctrain.triage.records import Event, Place, median, utc
from hpctrain.triage.rules import GREEN, NOT_OBSERVED, RED, Circumstances, Verdict
from hpctrain.triage.thresholds import Thresholds

_MOST_INCIDENTS = 40


@dataclass(frozen=True)
class Incident:
    """A failure of one attempt; `recovered` when a later attempt trained on."""

    event: Event
    attempt: Attempt
    recovered: bool

    def as_json(self) -> dict[str, Any]:
        return {
            **self.event.as_json(), "job_id": self.attempt.job_id, "restart": self.attempt.restart,
            "link": self.attempt.link, "recovered": self.recovered,
        }  # fmt: skip


@dataclass(frozen=True)
class Diagnosis:
    """The answer. `action` is one of retry, exclude node, stop, continue, look, wait, none."""

    verdict: str
    summary: str
    action: str
    advice: str
    cause: Incident | None = None
    verdicts: tuple[Verdict, ...] = ()
    incidents: tuple[Incident, ...] = ()
    remarks: tuple[str, ...] = ()
    progress: Mapping[str, Any] = field(default_factory=dict)

    @property
    def safe_to_scale(self) -> bool:
        """GREEN, with the loss falling as much as scaling up asks for."""
        return self.verdict == GREEN and bool(self.progress.get("loss_drop_enough"))

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict, "summary": self.summary, "action": self.action, "advice": self.advice,
            "cause": self.cause.as_json() if self.cause else None,
            "rules": [verdict.as_json() for verdict in self.verdicts],
            "incidents": [incident.as_json() for incident in self.incidents],
            "remarks": list(self.remarks), "progress": dict(self.progress), "safe_to_scale": self.safe_to_scale,
        }  # fmt: skip


def judge(engine: Engine, around: Circumstances | None = None, recipe: str | None = None) -> Diagnosis:
    """Judge everything that `engine` has read so far. Pure; may be called again after more was read."""
    around = around or Circumstances()
    attempts = in_order(engine.attempts)
    remarks = _remarks(engine)
    if not attempts:
        empty = not any(reader.num_bytes for reader in engine.logs.values())
        what = "there is no log, or it is empty" if empty else "nothing in the logs is about training"
        return Diagnosis(NOT_OBSERVED, what, "wait" if around.running else LOOK,
                         "see `hpctrain status`: is the job pending?", verdicts=tuple(_nothing()), remarks=tuple(remarks))  # fmt: skip
    # A job that was kept out by a lock says nothing about the run that holds it.
    last = next((attempt for attempt in reversed(attempts) if not attempt.locked_out), attempts[-1])
    trained = [attempt for attempt in attempts if attempt.num_steps]
    subject = last if last.num_steps or not trained else trained[-1]
    causes = {
        id(attempt): find_cause(attempt, around if attempt is last else Circumstances(running=False))
        for attempt in attempts
    }
    cause_event = causes[id(last)]
    verdicts = rules.health(subject, trained[0] if trained else subject)
    verdicts.append(rules.hang(last, around))
    verdicts += rules.failure_rules(last, cause_event, last.survived)
    verdicts.append(rules.ending(last, around, cause_event))
    verdicts += _start(last)
    incidents = [
        Incident(event, attempt, any(later.num_steps or later.exit_code == 0 for later in attempts[index + 1 :]))
        for index, attempt in enumerate(attempts)
        for event in [causes[id(attempt)]]
        if event is not None
    ]
    cause = next((incident for incident in reversed(incidents) if incident.attempt is last), None)
    remarks += _found_by_guard(attempts)
    framework = recipe or subject.framework
    return _answer(verdicts, cause, incidents, attempts, subject, trained, around, framework, remarks)


def in_order(attempts: list[Attempt]) -> list[Attempt]:
    """Oldest first: by job id where there is one, restarts within it, then as read."""

    def key(item: tuple[int, Attempt]) -> tuple[int, int, int]:
        index, attempt = item
        number = int(attempt.job_id) if attempt.job_id and attempt.job_id.isdigit() else 0
        return number, attempt.restart, index

    return [attempt for _, attempt in sorted(enumerate(attempts), key=key)]


def find_cause(attempt: Attempt, around: Circumstances) -> Event | None:
    """The earliest line that explains why the attempt ended, None when it did not fail or nothing tells.

    Lines after which training went on explain nothing. What comes after Slurm (or a person) ended the job is a
    consequence. What other ranks say after one failed (NCCL, launchers, kills) yields to any other reason, since output
    of different ranks is not in the order of time.
    """
    if attempt.reached_end and attempt.exit_code in (0, None):
        return None
    everything = sorted((event for kept in attempt.events.values() for event in kept), key=lambda event: event.order)
    events = [event for event in everything if not attempt.survived(event)]
    ends = [event for event in events if FAILURES[event.failure].external]
    if ends:
        events = [event for event in events if event.order <= ends[0].order]
    symptoms = [event for event in events if FAILURES[event.failure].symptom]
    roots = [event for event in events if not FAILURES[event.failure].symptom and not FAILURES[event.failure].external]
    first_symptom = min((event.order for event in symptoms if event.failure == "communication"), default=None)
    # An abort after a communication failure is how NCCL's watchdog ends the process.
    roots = [
        event for event in roots if not (_ABORT.search(event.text) and first_symptom and first_symptom < event.order)
    ]
    named = [event for event in roots if event.failure not in ("program", "crash")]
    general = [event for event in roots if event.failure in ("program", "crash")]
    if named and general and general[0].order < named[0].order and not _same_rank(general[0], named[0]):
        return general[0]  # another rank failed before, by an exception of its own
    killed = [event for event in symptoms if event.failure == "killed" and "exitcode" in event.text]
    killed.sort(key=lambda event: event.rank is None)
    wrapped = sorted((event for event in symptoms if event.failure == "wrapper"), key=lambda event: event.rank is None)
    others = [event for event in symptoms if event.failure != "wrapper"]
    if others and wrapped and wrapped[0].rank is not None and _LEFT_ALONE.search(others[0].text):
        others = []  # a rank that was left alone says so; torch names the one that left first
    if ends and ends[0].failure == "time_limit" and not (named or general or killed or others):
        if rules.hang(attempt, around).verdict == RED:
            return _silent_end(attempt, around)  # the limit only ended what had stopped long before
    # Ranks without collectives write on after one of them died, and on a slow node even after srun said so: when the
    # attempt failed and a launcher named a failed task, the last error that seemed survived was not.
    launcher_saw = wrapped or (attempt.exit_code and any(event.failure == "wrapper" for event in everything))
    doubtful = [event for event in everything if _tells(event)][-1:] if launcher_saw and attempt.exit_code != 0 else []
    for chosen in (named, general, killed, others, ends, doubtful, wrapped):
        if chosen:
            return _attributed(chosen[0], attempt)
    return _silent_end(attempt, around)


def _tells(event: Event) -> bool:
    """Whether the event names a reason by itself."""
    failure = FAILURES[event.failure]
    return not failure.symptom and not failure.external


def _attributed(event: Event, attempt: Attempt) -> Event:
    """With the rank and node that the job script saw fail first, where the line itself names none."""
    if event.rank is None and event.node is None and attempt.first_failed and not FAILURES[event.failure].external:
        return dataclasses.replace(event, rank=attempt.first_failed[0], node=attempt.first_failed[1])
    return event


_LEFT_ALONE = re.compile(r"(?:closed|reset) by (?:peer|remote)|remote process exited")
_ABORT = re.compile(r"terminate called|[Aa]borted|exitcode  : -6\b")


def _same_rank(one: Event, other: Event) -> bool:
    return one.rank == other.rank or one.rank is None or other.rank is None


def _silent_end(attempt: Attempt, around: Circumstances) -> Event | None:
    """What the figures tell when no line does: NaN, a hang, or an exit code."""
    place = attempt.last_place or Place(attempt.file, attempt.first_line)
    stuck = rules.hang(attempt, around)
    if stuck.verdict == RED:
        return Event("hang", place, stuck.detail, steps_before=attempt.num_steps)
    told = _BY_SLURM.get(attempt.slurm_state or "")
    if told and attempt.exit_code != 0:
        node = attempt.nodes[0] if told == "node" and len(attempt.nodes) == 1 else None
        return Event(told, place, f"Slurm says {attempt.slurm_state}", node=node, steps_before=attempt.num_steps)
    if attempt.exit_code == 93:
        return Event("gave_up", place, "exit code 93", steps_before=attempt.num_steps)
    if attempt.exit_code not in (0, None):
        bad = attempt.loss.first_bad or attempt.grad_bad.first_bad
        name, where = ("nonfinite", bad[0]) if bad else ("unknown", place)
        return Event(name, where, f"exit code {attempt.exit_code}", steps_before=attempt.num_steps)
    if around.running is False and attempt.exit_code is None and attempt.mode and attempt.job_id:
        node = attempt.nodes[0] if len(attempt.nodes) == 1 else None
        return Event(
            "cut_off",
            place,
            "the log ends here, without the job script's last line",
            node=node,
            steps_before=attempt.num_steps,
        )
    return None


# What Slurm's word for the end of a job means where the log tells nothing.
_BY_SLURM = {
    "NODE_FAIL": "node", "BOOT_FAIL": "node", "TIMEOUT": "time_limit", "DEADLINE": "time_limit", "PREEMPTED": "preemption",
    "REQUEUED": "preemption", "OUT_OF_MEMORY": "host_oom", "CANCELLED": "cancelled",
}  # fmt: skip


def _found_by_guard(attempts: list[Attempt]) -> list[str]:
    """What the guard found in the checkpoint folder and mended, start by start: how a damaged checkpoint becomes known."""
    return [
        f"before {_start_name(attempt)}: {'; '.join(attempt.guard_notes)}"
        for attempt in attempts[-_MOST_INCIDENTS:]
        if attempt.guard_notes
    ]


def _start_name(attempt: Attempt) -> str:
    name = f"link {attempt.link} (job {attempt.job_id})" if attempt.link is not None else f"job {attempt.job_id}"
    return name + (f", restart {attempt.restart}" if attempt.restart else "")


def _start(attempt: Attempt) -> list[Verdict]:
    """Whether a run that should go on from a checkpoint really did: NeoX trains on from random weights without a word."""
    lines = [event for event in attempt.events.get("checkpoint", ()) if "Unable to load checkpoint" in event.text]
    if attempt.mode in ("finetune", "resume") and lines and attempt.num_steps:
        detail = f"mode is {attempt.mode}, and no checkpoint was loaded: it trains from random weights"
        return [Verdict("start", RED, detail, lines[0].place, lines[0].text)]
    if attempt.mode and attempt.num_steps:
        return [Verdict("start", GREEN, f"mode {attempt.mode}, no complaint about the checkpoint")]
    return [Verdict("start", NOT_OBSERVED, "the log does not say how it started")]


def _answer(verdicts: list[Verdict], cause: Incident | None, incidents: list[Incident], attempts: list[Attempt],
            subject: Attempt, trained: list[Attempt], around: Circumstances, framework: str | None,
            remarks: list[str]) -> Diagnosis:  # fmt: skip
    red = [verdict for verdict in verdicts if verdict.verdict == RED]
    progress = _progress(subject, trained)
    if cause is not None:
        failure = FAILURES[cause.event.failure]
        action, advice = failure.action, advise(failure, framework, _suspect(incidents, cause))
        if failure.action == RETRY and sum(other.event.failure == cause.event.failure for other in incidents) > 2:
            action, advice = (
                STOP,
                f"this is the {len(incidents)}th time: do not retry again before the reason is known; {advice}",
            )
        summary = f"{failure.title}: {cause.event.text}" if cause.event.text else failure.title
        verdict = RED
    elif red:
        verdict, summary = RED, f"{red[0].rule}: {red[0].detail}"
        action, advice = _health_action(red[0].rule, framework, bool(around.running))
    elif trained and any(v.rule == "loss_finite" and v.verdict == GREEN for v in verdicts):
        verdict, summary = GREEN, "it trains, and no rule objects"
        action, advice = ("wait", "nothing to do") if around.running else ("none", "nothing to do")
        if not around.running and not subject.reached_end and attempts[-1].exit_code is None:
            summary = "as far as the log goes it trains, and no rule objects; it does not say how it ended"
    else:
        verdict, summary = NOT_OBSERVED, "no training step was seen yet" if not trained else "no loss was seen"
        action, advice = (
            ("wait", "look again after the first steps")
            if around.running
            else (LOOK, "see the end of the log: `hpctrain logs`")
        )
    if len(attempts) > 1:
        recovered = sum(incident.recovered for incident in incidents)
        remarks.append(f"{len(attempts)} attempts, {recovered} earlier failures that a later attempt got over")
    return Diagnosis(verdict, summary, action, advice, cause, tuple(verdicts), tuple(incidents[-_MOST_INCIDENTS:]),
                     tuple(remarks), progress)  # fmt: skip


def _health_action(rule: str, framework: str | None, running: bool) -> tuple[str, str]:
    names = knobs(framework)
    advice = {
        "loss_finite": f"lower {names['lr']} or lengthen the warmup, look at the data of that step, go back to a checkpoint from before it",
        "loss_trend": f"look at {names['lr']}, the loss mask and the data: the model does not learn",
        "loss_rise": f"go back to a checkpoint from before the rise and lower {names['lr']}",
        "gradients": f"set gradient clipping, lower {names['lr']}, look at the data of that step",
        "skipped_steps": "use bf16 instead of fp16, or lower the initial loss scale",
        "throughput": "`hpctrain preflight` names slow nodes; exclude them",
        "start": "stop it; `hpctrain checkpoint list` shows what could have been loaded",
    }.get(rule, "look at the line")  # fmt: skip
    if rule == "throughput":
        return EXCLUDE, advice
    return STOP, advice if not running else f"`hpctrain stop`, then: {advice}"


def _suspect(incidents: list[Incident], cause: Incident) -> str | None:
    """The node to exclude: the cause's, or the one that earlier failures name most often."""
    if cause.event.node:
        return cause.event.node
    nodes = [incident.event.node for incident in incidents if incident.event.node]
    return max(set(nodes), key=nodes.count) if nodes else None


def _progress(subject: Attempt, trained: list[Attempt]) -> dict[str, Any]:
    first, last = (trained[0].first, subject.last) if trained else (None, None)
    drop = rules.loss_drop(trained[0], subject.thresholds) if trained else None
    return {
        "framework": subject.framework,
        "step_lines": sum(attempt.num_steps for attempt in trained),
        "first_iteration": first.iteration if first else None,
        "last_iteration": last.iteration if last else None,
        "total_iterations": subject.total,
        "first_loss": _plain(first.loss) if first else None,
        "last_loss": _plain(last.loss) if last else None,
        "loss_drop": drop,
        "loss_drop_enough": drop is not None and drop >= subject.thresholds.loss_drop_to_scale,
        "step_time_s": median(subject.step_times.last()) if subject.step_times.values else None,
        "rate": median(subject.rates.last()) if subject.rates.values else None,
        "rate_unit": subject.rate_unit,
        "last_step_time": utc(subject.last_step_time_s),
    }


def _plain(value: float | None) -> float | str | None:
    """JSON knows no NaN."""
    return value if value is None or math.isfinite(value) else str(value)


def _remarks(engine: Engine) -> list[str]:
    out = []
    for name, reader in engine.logs.items():
        if reader.binary:
            out.append(f"{name} holds binary data; what is text in it was read")
        if not reader.num_bytes:
            out.append(f"{name} is empty")
    return out


def _nothing() -> list[Verdict]:
    attempt = Attempt("", Thresholds())
    verdicts = [*rules.health(attempt, attempt), rules.hang(attempt, Circumstances())]
    verdicts += rules.failure_rules(attempt, None, attempt.survived)
    return [
        dataclasses.replace(verdict, verdict=NOT_OBSERVED)
        for verdict in [*verdicts, rules.ending(attempt, Circumstances(), None)]
    ]


__all__ = ["CONTINUE", "Circumstances", "Diagnosis", "Incident", "find_cause", "in_order", "judge"]
