"""Which line explains why a start of a job ended: the cause among everything that ranks, launchers
and Slurm said."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from hpctrain.triage import rules
from hpctrain.triage.attempt import Attempt
from hpctrain.triage.failures import FAILURES
from hpctrain.triage.records import Event, Place
from hpctrain.triage.rules import RED, Circumstances


def causes_of(
    attempts: Sequence[Attempt], around: Circumstances, last: Attempt
) -> dict[int, Event | None]:
    """The cause of each attempt's end by its `id`, with what the starts after it tell; `around` is
    what is known of `last`."""
    newest: dict[str, int] = {}
    for attempt in attempts:
        if attempt.job_id:
            newest[attempt.job_id] = max(attempt.restart, newest.get(attempt.job_id, 0))
    out = {}
    for attempt in attempts:
        cause = find_cause(attempt, around if attempt is last else Circumstances(running=False))
        if cause is not None and newest.get(attempt.job_id or "", 0) > attempt.restart:
            cause = _put_back(cause, attempt)
        out[id(attempt)] = cause
    return out


def _put_back(cause: Event, attempt: Attempt) -> Event:
    """The cause of a start after which Slurm started the same job again: nobody who cancels a job
    or kills its script has that.

    Slurm requeues by itself only what lost its node or was preempted (man sbatch, --requeue;
    slurm.conf, JobRequeue).
    """
    if cause.failure == "cancelled":
        return dataclasses.replace(
            cause, failure="preemption", text=f"{cause.text}; Slurm then started the job again"
        )
    if (
        cause.failure in ("cut_off", "killed", "wrapper")
        and attempt.exit_code is None
        and not attempt.slurm_state
    ):
        text = f"{cause.text}; Slurm then started the job again, as it does when a node is lost"
        return dataclasses.replace(cause, failure="node", text=text)
    return cause


def find_cause(attempt: Attempt, around: Circumstances) -> Event | None:
    """The earliest line that explains why the attempt ended, None when it did not fail or nothing
    tells.

    Lines after which training went on explain nothing. What comes after Slurm (or a person) ended
    the job is a consequence. What other ranks say after one failed (NCCL, launchers, kills) yields
    to any other reason, since output of different ranks is not in the order of time.
    """
    if attempt.reached_end and attempt.exit_code in (0, None):
        if attempt.exit_code == 0:
            return None
        if not _fell_at_the_end(attempt):
            return None if attempt.finished else _ended_in_last_save(attempt, around)
    everything = sorted(
        (event for kept in attempt.events.values() for event in kept), key=lambda event: event.order
    )
    events = [event for event in everything if not attempt.survived(event)]
    ends = [event for event in events if FAILURES[event.failure].external]
    if ends:
        events = [event for event in events if event.order <= ends[0].order]
    symptoms = [event for event in events if FAILURES[event.failure].symptom]
    roots = [
        event
        for event in events
        if not FAILURES[event.failure].symptom and not FAILURES[event.failure].external
    ]
    roots = _without_aborts(roots, symptoms)
    asides = [event for event in roots if event.weak]
    roots = [event for event in roots if not event.weak]
    named = [event for event in roots if event.failure not in ("program", "crash")]
    general = [event for event in roots if event.failure in ("program", "crash")]
    if _other_rank_was_first(general, named):
        return general[0]
    killed = [event for event in symptoms if event.failure == "killed" and "exitcode" in event.text]
    killed.sort(key=lambda event: event.rank is None)
    wrapped = _of_launchers(symptoms, attempt)
    others = [event for event in symptoms if event.failure != "wrapper"]
    if ends and ends[0].failure == "script_killed":
        others = []  # its tasks were killed after it
    if others and wrapped and wrapped[0].rank is not None and _LEFT_ALONE.search(others[0].text):
        others = []  # a rank that was left alone says so; torch names the one that left first
    if ends and ends[0].failure == "time_limit" and not (named or general or killed or others):
        if rules.hang(attempt, around).verdict == RED:
            return _silent_end(attempt, around)  # the limit only ended what had stopped long before
    # Ranks without collectives write on after one of them died, and on a slow node even after srun
    # said so: when the attempt failed and a launcher named a failed task, the last error that
    # seemed survived was not.
    launcher_saw = wrapped or (
        attempt.exit_code and any(event.failure == "wrapper" for event in everything)
    )
    doubtful = [event for event in everything if _tells(event) and not event.weak][-1:]
    doubtful = doubtful if launcher_saw and attempt.exit_code != 0 else []
    if (
        wrapped
        and _never_ended(attempt, around)
        and all(_BY_SIGNAL.search(event.text) for event in wrapped)
    ):
        wrapped = []  # nobody was there any more to say who ended the tasks
    # A severity, or a shell's complaint, explains only a start that never trained or that a
    # launcher saw fail.
    told = [event for event in asides if event.failure != "program"] or asides
    asides = told if launcher_saw or not attempt.num_steps else []
    for chosen in (named, general, killed, others, ends, doubtful, asides, wrapped):
        if chosen:
            best = _in_callers_words(chosen)
            return _attributed(_with_rank(best, everything), attempt)
    return _silent_end(attempt, around)


def _without_aborts(roots: list[Event], symptoms: list[Event]) -> list[Event]:
    """An abort is how a watchdog, a monitor or an uncaught error ends a process: it explains only
    what nothing else does. What a rank says that was left alone follows from the abort."""
    reasons = [event for event in symptoms if event.failure == "communication"]
    reasons = [event for event in reasons if not _LEFT_ALONE.search(event.text)]
    reasons += [event for event in roots if not _ABORT.search(event.text) and not event.weak]
    return [event for event in roots if not (reasons and _ABORT.search(event.text))]


def _other_rank_was_first(general: list[Event], named: list[Event]) -> bool:
    """Whether another rank failed before, by an exception of its own; only one file has an
    order."""
    if not general or not named or general[0].place.file != named[0].place.file:
        return False
    return general[0].order < named[0].order and not _same_rank(general[0], named[0])


def _of_launchers(symptoms: list[Event], attempt: Attempt) -> list[Event]:
    """What launchers say of failed tasks, first what names a rank; what they say in passing only
    where nothing trained."""
    wrapped = [event for event in symptoms if event.failure == "wrapper"]
    wrapped.sort(key=lambda event: event.rank is None)
    strong = [event for event in wrapped if not event.weak]
    return strong or (wrapped if not attempt.num_steps else [])


_OF_SAVING = ("disk", "host_oom", "gpu_oom")


def _fell_at_the_end(attempt: Attempt) -> bool:
    """Whether a program that did all its steps failed while it saved: its storage or memory failed
    after the last, or a launcher saw it fail by an error of its own."""
    late = [
        event
        for kept in attempt.events.values()
        for event in kept
        if event.steps_before >= attempt.num_steps and not event.weak
    ]
    if any(event.failure in _OF_SAVING for event in late):
        return True
    told = any(_tells(event) and event.failure != "crash" for event in late)
    return told and any(event.failure == "wrapper" for event in late)


def _ended_in_last_save(attempt: Attempt, around: Circumstances) -> Event | None:
    """All iterations are done, but the job script did not come to its end: the last save may not be
    whole."""
    ends = [
        event
        for name, kept in attempt.events.items()
        if FAILURES[name].external or name == "node"
        for event in kept
    ]
    ends = [event for event in ends if event.steps_before >= attempt.num_steps]
    if ends:
        return min(ends, key=lambda event: event.order)
    return _silent_end(attempt, around) if _never_ended(attempt, around) else None


def _never_ended(attempt: Attempt, around: Circumstances) -> bool:
    """Whether a job script of ours was ended before it could say how its step ended."""
    return (
        around.running is False
        and attempt.exit_code is None
        and bool(attempt.mode and attempt.job_id)
    )


_BY_SIGNAL = re.compile(r"exit code (?:143|137)\b|SIGTERM|signal: 15")


def _tells(event: Event) -> bool:
    """Whether the event names a reason by itself."""
    failure = FAILURES[event.failure]
    return not failure.symptom and not failure.external


def _with_rank(event: Event, everything: list[Event]) -> Event:
    """With the rank (and node) that the next line about the same failure names, where this one
    names none."""
    if FAILURES[event.failure].external:
        return event
    if event.rank is not None and event.node is None:
        named = [other.node for other in everything if other.rank == event.rank and other.node]
        return dataclasses.replace(event, node=named[-1]) if named else event
    if event.rank is not None:
        return event
    for other in everything:
        near = (
            other.place.file == event.place.file
            and 0 < other.place.number - event.place.number <= _NEAR
        )
        if (
            near
            and other.failure == event.failure
            and other.rank is not None
            and other.node in (None, event.node or other.node)
        ):
            return dataclasses.replace(event, rank=other.rank, node=event.node or other.node)
    return event


_NEAR = 20  # lines
_CHAIN = 200  # lines of chained tracebacks


def _in_callers_words(chosen: list[Event]) -> Event:
    """The first of a chain of exceptions, or where that is a library's about a connection, the
    caller's own of the same failure below it."""
    first = chosen[0]
    if not _LOW_LEVEL.search(first.text):
        return first
    for other in chosen[1:]:
        below = other.place.file == first.place.file
        below = below and other.place.number - first.place.number <= _CHAIN
        same = other.failure == first.failure and other.rank == first.rank
        if below and same and not _LOW_LEVEL.search(other.text):
            return other
    return first


def _attributed(event: Event, attempt: Attempt) -> Event:
    """With the rank and node that the job script saw fail first, or else the only node of which a
    launcher says that a task failed there, where the line itself names none."""
    if event.rank is not None or event.node is not None or FAILURES[event.failure].external:
        return event
    if attempt.first_failed:
        return dataclasses.replace(
            event, rank=attempt.first_failed[0], node=attempt.first_failed[1]
        )
    failed = attempt.events.get("wrapper", ())
    nodes = {other.node for other in failed if other.node}
    return dataclasses.replace(event, node=nodes.pop()) if len(nodes) == 1 else event


_LEFT_ALONE = re.compile(r"(?:closed|reset) by (?:peer|remote)|remote process exited")
_ABORT = re.compile(
    r"terminate called|[Aa]borted|SIGABRT|[Ss]ignal:? 6\b"
    r"|\b(?:exitcode|code|status)[ :=]+(?:-6|134)\b"
)
# How a library words it when a connection fails; the caller's own exception says of what.
_LOW_LEVEL = re.compile(
    r"urllib3\.|requests\.exc|http(?:x|core)\.|aiohttp\.|ConnectionRefusedError|socket\."
)


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
        return Event(
            told,
            place,
            f"Slurm says {attempt.slurm_state}",
            node=node,
            steps_before=attempt.num_steps,
        )
    if attempt.slurm_signal == 9 and attempt.exit_code is None and attempt.mode:
        return Event(
            "script_killed",
            place,
            f"Slurm says {attempt.slurm_state}, by signal 9",
            steps_before=attempt.num_steps,
        )
    if attempt.exit_code == 93:
        return Event("gave_up", place, "exit code 93", steps_before=attempt.num_steps)
    if attempt.exit_code not in (0, None):
        bad = attempt.loss.first_bad or attempt.grad_bad.first_bad
        name, where = ("nonfinite", bad[0]) if bad else ("unknown", place)
        return Event(name, where, f"exit code {attempt.exit_code}", steps_before=attempt.num_steps)
    if _never_ended(attempt, around):
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
    "NODE_FAIL": "node",
    "BOOT_FAIL": "node",
    "TIMEOUT": "time_limit",
    "DEADLINE": "time_limit",
    "PREEMPTED": "preemption",
    "REQUEUED": "preemption",
    "OUT_OF_MEMORY": "host_oom",
    "CANCELLED": "cancelled",
}
