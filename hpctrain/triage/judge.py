"""From everything that was read to one answer: the cause, what to do next, and every rule's
verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpctrain.triage import rules
from hpctrain.triage.attempt import Attempt
from hpctrain.triage.cause import causes_of
from hpctrain.triage.engine import Engine
from hpctrain.triage.failures import (
    CONTINUE,
    EXCLUDE,
    FAILURES,
    LOOK,
    RETRY,
    STOP,
    Outlook,
    knobs,
    outlook,
)
from hpctrain.triage.records import Event, distinct, median, start_of_log, utc
from hpctrain.triage.rules import GREEN, NOT_OBSERVED, RED, Circumstances, Verdict
from hpctrain.triage.thresholds import Thresholds

_MOST_INCIDENTS = 40


@dataclass(frozen=True)
class Incident:
    """A failure of one attempt; `recovered` when a later attempt trained on."""

    event: Event
    attempt: Attempt
    recovered: bool

    @property
    def role(self) -> str:
        """`root`; `cascade` or `teardown` where only what followed it is told: other ranks' words,
        or a launcher's."""
        if self.event.failure == "wrapper":
            return "teardown"
        return "cascade" if FAILURES[self.event.failure].symptom else "root"

    def outlook(self, framework: str | None = None, node: str | None = None) -> Outlook:
        """Whose it is, whether it will recur, and so what to do."""
        return outlook(self.event.failure, self.event.text, framework, node)

    def as_json(self) -> dict[str, Any]:
        meaning = self.outlook()
        return {
            **self.event.as_json(),
            "kind": meaning.kind,
            "role": self.role,
            "whose": meaning.whose,
            "recurs": meaning.recurs,
            "job_id": self.attempt.job_id,
            "restart": self.attempt.restart,
            "link": self.attempt.link,
            "recovered": self.recovered,
        }


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
    thresholds: Thresholds = field(default_factory=Thresholds)

    @property
    def safe_to_scale(self) -> bool:
        """GREEN, with the loss falling as much as scaling up asks for."""
        return self.verdict == GREEN and bool(self.progress.get("loss_drop_enough"))

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "summary": self.summary,
            "action": self.action,
            "advice": self.advice,
            "cause": self.cause.as_json() if self.cause else None,
            "rules": [verdict.as_json() for verdict in self.verdicts],
            "incidents": [incident.as_json() for incident in self.incidents],
            "remarks": list(self.remarks),
            "progress": dict(self.progress),
            "safe_to_scale": self.safe_to_scale,
        }


def judge(
    engine: Engine, around: Circumstances | None = None, recipe: str | None = None
) -> Diagnosis:
    """Judge everything that `engine` has read so far. Pure; may be called again after more was
    read."""
    around = around or Circumstances()
    attempts = joined(in_order(engine.attempts))
    remarks = _remarks(engine)
    if not attempts:
        empty = not any(reader.num_bytes for reader in engine.logs.values())
        what = (
            "there is no log, or it is empty"
            if empty
            else f"I read no step line that I know{_last_words(engine)}"
        )
        return Diagnosis(
            NOT_OBSERVED,
            what,
            "wait" if around.running else LOOK,
            "see `hpctrain status`: is the job pending?"
            if empty
            else "see the end of the log: `hpctrain logs`",
            verdicts=tuple(_nothing()),
            remarks=tuple(remarks),
        )
    # A job that was kept out by a lock says nothing about the run that holds it.
    last = next((attempt for attempt in reversed(attempts) if not attempt.locked_out), attempts[-1])
    trained = [attempt for attempt in attempts if attempt.num_steps]
    subject = last if last.num_steps or not trained else trained[-1]
    causes = causes_of(attempts, around, last)
    cause_event = causes[id(last)]
    verdicts = rules.health(subject, trained[0] if trained else subject)
    verdicts.append(_hang(last, around, cause_event))
    verdicts += rules.failure_rules(
        last, cause_event, lambda event: last.survived(event) or (event.weak and last.num_steps > 0)
    )
    verdicts.append(rules.ending(last, around, cause_event))
    verdicts += _start(last)
    incidents = [
        Incident(event, attempt, any(map(_got_on, attempts[index + 1 :])))
        for index, attempt in enumerate(attempts)
        for event in [causes[id(attempt)]]
        if event is not None
    ]
    cause, ended = _deciding(incidents, last)
    remarks += _found_by_guard(attempts)
    remarks += _came_after(incidents)
    remarks += _left_no_word(attempts)
    framework = recipe or subject.framework
    return _answer(
        verdicts, cause, ended, incidents, attempts, subject, trained, around, framework, remarks
    )


def _hang(last: Attempt, around: Circumstances, cause: Event | None) -> Verdict:
    if cause is not None and cause.failure == "hang":
        return Verdict("hang", RED, "it made no progress any more", cause.place, cause.text)
    return rules.hang(last, around)


def _got_on(attempt: Attempt) -> bool:
    """Whether what failed before this start does not matter any more."""
    return bool(attempt.num_steps) or attempt.exit_code == 0 and not _stopped(attempt)


def _stopped(attempt: Attempt) -> bool:
    """Whether the guard let it train nothing, as somebody asked for."""
    return attempt.mode == "stopped" or "stops, as asked" in (attempt.finished or "")


def _deciding(incidents: list[Incident], last: Attempt) -> tuple[Incident | None, str]:
    """What ended the run, and what came of it: the last start's failure, or, where the guard let
    that one train nothing, the newest that no later start got over."""
    own = next((incident for incident in reversed(incidents) if incident.attempt is last), None)
    gave_up = own is not None and own.event.failure == "gave_up"
    if not gave_up and (own or last.num_steps or not _stopped(last)):
        return own, ""
    for incident in reversed(incidents):
        failure = FAILURES[incident.event.failure]
        told = incident is not own and not incident.recovered
        if told and incident.event.failure != "gave_up" and (gave_up or not failure.external):
            return incident, "the chain gave up after this: " if gave_up else "before it stopped: "
    return own, ""


def _last_words(engine: Engine) -> str:
    like = [reader.like_a_step for reader in engine.logs.values() if reader.like_a_step]
    if like:
        return f"; most like one is: {like[-1]}"
    words = [reader.last_words for reader in engine.logs.values() if reader.last_words]
    return f"; the last line: {words[-1]}" if words else ""


def in_order(attempts: list[Attempt]) -> list[Attempt]:
    """Oldest first: by job id where there is one, restarts within it, then as read."""

    def key(item: tuple[int, Attempt]) -> tuple[int, int, int]:
        index, attempt = item
        number = int(attempt.job_id) if attempt.job_id and attempt.job_id.isdigit() else 0
        return number, attempt.restart, index

    return [attempt for _, attempt in sorted(enumerate(attempts), key=key)]


def joined(attempts: list[Attempt]) -> list[Attempt]:
    """The attempts with the files of one start made one: its two streams, or a file for each rank.
    A file in which the job script itself speaks keeps its own starts."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        groups.setdefault(start_of_log(attempt.file), []).append(attempt)
    out: list[Attempt] = []
    for group in groups.values():
        spoken = [attempt for attempt in group if attempt.first_told]
        others = [attempt for attempt in group if not attempt.first_told]
        if len({attempt.file for attempt in group}) == 1 or (spoken and not others):
            out += group
            continue
        main = spoken[-1] if spoken else max(others, key=lambda attempt: attempt.num_steps)
        rest = [attempt for attempt in others if attempt is not main]
        out += [attempt for attempt in spoken if attempt is not main] + [main.with_files(rest)]
    return in_order(out)


def _found_by_guard(attempts: list[Attempt]) -> list[str]:
    """What the guard found in the checkpoint folder and mended, start by start: how a damaged
    checkpoint becomes known."""
    return [
        f"before {_start_name(attempt)}: {'; '.join(distinct(attempt.guard_notes))}"
        for attempt in attempts[-_MOST_INCIDENTS:]
        if attempt.guard_notes
    ]


def _came_after(incidents: list[Incident]) -> list[str]:
    """Who ended a start that had failed already: of two faults in one start only the first is its
    cause."""
    out = []
    for incident in incidents[-_MOST_INCIDENTS:]:
        later = [
            event
            for name, kept in incident.attempt.events.items()
            if FAILURES[name].external and name != incident.event.failure
            for event in kept
            if event.order > incident.event.order and "hpctrain: " not in event.text
        ]
        if later and not FAILURES[incident.event.failure].external:
            first = min(later, key=lambda event: event.order)
            title = FAILURES[first.failure].title
            out.append(
                f"{_start_name(incident.attempt)}, after its failure ({incident.event.failure}):"
                f" {title} at {first.place}"
            )
    return out


def _left_no_word(attempts: list[Attempt]) -> list[str]:
    """Starts of a job that its log knows only by the numbers of the starts after them."""
    out = []
    for before, attempt in zip(attempts, attempts[1:]):
        missing = (
            range(before.restart + 1, attempt.restart)
            if attempt.job_id == before.job_id
            else range(0)
        )
        if missing:
            which = (
                f"restart {missing[0]}"
                if len(missing) == 1
                else f"restarts {missing[0]} to {missing[-1]}"
            )
            out.append(
                f"job {attempt.job_id}: {which} left no word in the log: Slurm ended it before its"
                " first line"
            )
    return out[-_MOST_INCIDENTS:]


def _start_name(attempt: Attempt) -> str:
    name = (
        f"link {attempt.link} (job {attempt.job_id})"
        if attempt.link is not None
        else f"job {attempt.job_id}"
    )
    return name + (f", restart {attempt.restart}" if attempt.restart else "")


def _start(attempt: Attempt) -> list[Verdict]:
    """Whether a run that should go on from a checkpoint really did: NeoX trains on from random
    weights without a word."""
    lines = [
        event
        for event in attempt.events.get("checkpoint", ())
        if "Unable to load checkpoint" in event.text
    ]
    if attempt.mode in ("finetune", "resume") and lines and attempt.num_steps:
        detail = (
            f"mode is {attempt.mode}, and no checkpoint was loaded: it trains from random weights"
        )
        return [Verdict("start", RED, detail, lines[0].place, lines[0].text)]
    if attempt.mode and attempt.num_steps:
        return [Verdict("start", GREEN, f"mode {attempt.mode}, no complaint about the checkpoint")]
    return [Verdict("start", NOT_OBSERVED, "the log does not say how it started")]


def _answer(
    verdicts: list[Verdict],
    cause: Incident | None,
    ended: str,
    incidents: list[Incident],
    attempts: list[Attempt],
    subject: Attempt,
    trained: list[Attempt],
    around: Circumstances,
    framework: str | None,
    remarks: list[str],
) -> Diagnosis:
    red = [verdict for verdict in verdicts if verdict.verdict == RED]
    progress = _progress(subject, trained)
    if cause is not None:
        failure = FAILURES[cause.event.failure]
        found = cause.outlook(framework, _suspect(incidents, cause))
        action, advice = found.action, found.advice
        if (
            action == RETRY
            and sum(other.event.failure == cause.event.failure for other in incidents) > 2
        ):
            action, advice = (
                STOP,
                (
                    f"this is the {len(incidents)}th time: do not retry again before the reason is"
                    f" known; {advice}"
                ),
            )
        summary = f"{failure.title}: {cause.event.text}" if cause.event.text else failure.title
        summary = ended + summary
        verdict = RED
    elif red:
        verdict, summary = RED, f"{red[0].rule}: {red[0].detail}"
        action, advice = _health_action(red[0].rule, framework, bool(around.running))
    elif trained and (
        subject.objective == "policy"
        or any(v.rule == "loss_finite" and v.verdict == GREEN for v in verdicts)
    ):
        verdict, summary = GREEN, "it trains, and no rule objects"
        action, advice = ("wait", "nothing to do") if around.running else ("none", "nothing to do")
        if not around.running and not subject.reached_end and attempts[-1].exit_code is None:
            summary = (
                "as far as the log goes it trains, and no rule objects; it does not say how it"
                " ended"
            )
    else:
        verdict, summary = (
            NOT_OBSERVED,
            ("no training step was seen yet" if not trained else "no loss was seen"),
        )
        action, advice = (
            ("wait", "look again after the first steps")
            if around.running
            else (LOOK, "see the end of the log: `hpctrain logs`")
        )
    if len(attempts) > 1:
        recovered = sum(incident.recovered for incident in incidents)
        remarks.append(
            f"{len(attempts)} attempts, {recovered} earlier failures that a later attempt got over"
        )
    return Diagnosis(
        verdict,
        summary,
        action,
        advice,
        cause,
        tuple(verdicts),
        tuple(incidents[-_MOST_INCIDENTS:]),
        tuple(remarks),
        progress,
        subject.thresholds,
    )


def _health_action(rule: str, framework: str | None, running: bool) -> tuple[str, str]:
    names = knobs(framework)
    advice = {
        "loss_finite": (
            f"lower {names['lr']} or lengthen the warmup, look at the data of that step, go back to"
            " a checkpoint from before it"
        ),
        "loss_trend": (
            f"look at {names['lr']}, the loss mask and the data: the model does not learn"
        ),
        "loss_rise": f"go back to a checkpoint from before the rise and lower {names['lr']}",
        "gradients": f"set gradient clipping, lower {names['lr']}, look at the data of that step",
        "skipped_steps": "use bf16 instead of fp16, or lower the initial loss scale",
        "throughput": "`hpctrain preflight` names slow nodes; exclude them",
        "start": "stop it; `hpctrain checkpoint list` shows what could have been loaded",
    }.get(rule, "look at the line")
    if rule == "throughput":
        return EXCLUDE, advice
    return STOP, advice if not running else f"`hpctrain stop`, then: {advice}"


_NODES_OWN = ("gpu_fault", "node", "nonfinite", "killed", "host_oom")


def _suspect(incidents: list[Incident], cause: Incident) -> str | None:
    """The node to blame: the one where a GPU or the node itself failed, or the peer that several
    ranks name; None for a node that only reported."""
    event = cause.event
    if event.failure in ("communication", "hang"):
        return cause.attempt.blamed_peer
    if event.failure not in _NODES_OWN:
        return None
    nodes = [other.event.node for other in incidents if other.event.failure == event.failure]
    named = [node for node in nodes if node]
    return event.node or (max(set(named), key=named.count) if named else None)


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


__all__ = ["CONTINUE", "Circumstances", "Diagnosis", "Incident", "in_order", "judge"]
