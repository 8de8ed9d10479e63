"""Prints a diagnosis: the answer first, then what it rests on."""

from __future__ import annotations

from typing import Any

from hpctrain.base import terminal
from hpctrain.runs.diagnose import Subject
from hpctrain.runs.logs import whose
from hpctrain.triage.failures import FAILURES
from hpctrain.triage.judge import Diagnosis
from hpctrain.triage.rules import GREEN, RED

_COLOUR = {GREEN: "green", RED: "red"}


def as_fields(subject: Subject, diagnosis: Diagnosis) -> dict[str, Any]:
    """The whole answer for `--json`."""
    return {
        "run": subject.run.name if subject.run else None,
        "run_dir": subject.run.run_dir if subject.run else None,
        "logs": [
            {
                "file": name,
                "bytes": reader.num_bytes,
                "lines": reader.num_lines,
                "binary": reader.binary,
            }
            for name, reader in subject.engine.logs.items()
        ],
        **diagnosis.as_json(),
        "unseen": subject.unseen,
    }


def diagnose(subject: Subject) -> Diagnosis:
    """Read and judge, with a line of progress (and the first failure so far) where reading takes
    long."""
    lines: list[terminal.Progress] = []

    def on_progress(done: int, total: int, first: str) -> None:
        if not lines:
            lines.append(terminal.Progress("reading logs", total / 1e6, "MB", every_s=5.0))
        lines[0].update(done / 1e6, first)

    try:
        return subject.diagnose(on_progress)
    finally:
        for line in lines:
            line.close()


def show(subject: Subject, diagnosis: Diagnosis) -> None:
    """The answer as text: verdict, cause, advice to stdout; the rules as a table; remarks to
    stderr."""
    verdict = terminal.paint(diagnosis.verdict, _COLOUR.get(diagnosis.verdict, "yellow"))
    terminal.data(f"{verdict}  {diagnosis.summary}")
    cause = diagnosis.cause
    if cause is not None:
        where = ", ".join([f"line {cause.event.place}", *whose(cause)])
        terminal.data(f"cause: {where}")
    terminal.data(f"next: {diagnosis.action}: {diagnosis.advice}")
    progress = diagnosis.progress
    if progress.get("step_lines"):
        total = f" of {progress['total_iterations']}" if progress.get("total_iterations") else ""
        losses = (
            f", loss {figure(progress['first_loss'])} to {figure(progress['last_loss'])}"
            if progress.get("first_loss") is not None
            else ""
        )
        terminal.data(
            f"seen: iterations {progress['first_iteration']} to"
            f" {progress['last_iteration']}{total}{losses}"
        )
    terminal.data("")
    terminal.table(
        [
            (
                rule.rule,
                rule.verdict,
                rule.detail + (f"  [{rule.text}]" if rule.text else ""),
                rule.place or "",
            )
            for rule in sorted(
                diagnosis.verdicts, key=lambda rule: (rule.verdict != RED, rule.verdict == GREEN)
            )
        ],
        ("rule", "verdict", "what was seen", "line"),
    )
    for incident in diagnosis.incidents:
        if incident is not cause:
            event = incident.event
            fate = "a later attempt went on" if incident.recovered else "no later attempt trained"
            title = FAILURES[event.failure].title
            terminal.info(f"earlier: {title} at {event.place} ({fate}): {event.text}")
    terminal.notes(diagnosis.remarks)
    terminal.unseen(subject.unseen)


def figure(value: object) -> str:
    """A number of a log with as many digits as tell something."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
