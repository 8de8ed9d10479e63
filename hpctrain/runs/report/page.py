"""The report as one HTML page that needs nothing else: style, drawings and figures inside it.

The page is `report.html.j2`, which escapes every value; here is what it shows.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from hpctrain import __version__
from hpctrain.base.units import format_duration
from hpctrain.runs.diagnosis import figure
from hpctrain.runs.report import figures
from hpctrain.runs.report.gather import AttemptRow, Report
from hpctrain.triage.failures import FAILURES
from hpctrain.triage.judge import Diagnosis, Incident
from hpctrain.triage.records import Event, utc
from hpctrain.triage.rules import GREEN, RED

MARK = "<!-- hpctrain report -->"  # by which a report is known; report.html.j2 has it
_NO_STEP = {
    "done": "nothing left to do",
    "stopped": "stopped, as asked",
    "gave_up": "the chain gave up",
}


def page(report: Report, curves_svg: str, timeline_svg: str | None) -> str:
    """The whole page of a run; the drawings are SVG elements."""
    run, diagnosis = report.run, report.diagnosis
    recipe, site = run.recipe and f"recipe {run.recipe}", run.plan.get("site")
    cause = diagnosis.cause.event if diagnosis.cause else None
    return _template().render(
        name=run.name,
        version=__version__,
        facts=_listed(recipe, site and f"site {site}", run.run_dir),
        report=report,
        diagnosis=diagnosis,
        cause=cause,
        cause_of=_whose(cause) if cause else "",
        before=_before(diagnosis),
        tiles=list(_tiles(report)),
        curves=Markup(curves_svg),
        caption=" ".join(_caption(report)),
        timeline=Markup(timeline_svg or ""),
        starts=[_start(row) for row in report.rows],
        rules=sorted(diagnosis.verdicts, key=lambda v: (v.verdict != RED, v.verdict == GREEN)),
        incidents=[_incident(incident) for incident in diagnosis.incidents],
        cadence=_cadence(report.cadence),
        notes=list(_notes(report)),
    )


def pipeline_page(name: str, rows: Sequence[Mapping[str, Any]], folder: str) -> str:
    """The page of a pipeline that lies in `folder`: its stages in order, each with a link to its
    own page.

    A row has `stage`, `run`, `state`, `from`, `hand_over`, `got`, `iteration`, `target` and `page`
    (None where there is none).
    """
    stages = [
        {
            "name": row["stage"],
            "run": row["run"],
            "state": row["state"],
            "href": quote(os.path.relpath(row["page"], folder)) if row["page"] else "",
            "gets": (
                f"{row['got'] or row['hand_over']} of stage {row['from']}" if row["from"] else ""
            ),
            "at": _of_target(row["iteration"], row["target"]),
        }
        for row in rows
    ]
    return _template().render(name=name, version=__version__, stages=stages)


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(os.path.dirname(os.path.abspath(__file__))),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(utc=utc, last_part=_last_part)
    return environment.get_template("report.html.j2")


def _last_part(place: object) -> str:
    """The file's name and line, since the page says where the run is."""
    return str(place).rsplit("/", 1)[-1] if place else ""


def _listed(*parts: object) -> str:
    return ", ".join(str(part) for part in parts if part)


def _of_target(iteration: int | None, target: int | None) -> str:
    return "" if iteration is None else f"{iteration} of {target or 'an unknown number'}"


def _whose(event: Event) -> str:
    rank = "" if event.rank is None else f"rank {event.rank}"
    who = _listed(rank, event.node and f"node {event.node}")
    return f" ({who})" if who else ""


def _before(diagnosis: Diagnosis) -> str:
    """What failed besides the cause, and whether training went on after it."""
    others = [incident for incident in diagnosis.incidents if incident is not diagnosis.cause]
    if not others:
        return ""
    counted = Counter(FAILURES[incident.event.failure].title for incident in others)
    names = (f"{name} ({count} times)" if count > 1 else name for name, count in counted.items())
    went_on = all(incident.recovered for incident in others)
    return f"{_listed(*names)}; {'a later start went on' if went_on else 'see Failures'}"


def _caption(report: Report) -> Iterator[str]:
    if len([row for row in report.rows if row.first_iteration is not None]) > 1:
        yield "Each colour is one start of a job; a dashed line is where one begins."
    if any(row.lost_iterations for row in report.rows):
        yield "Shaded: iterations that a later start did again, or that no checkpoint holds."
    if absent := figures.missing(report):
        yield f"Not in the logs: {', '.join(absent)}."


def _amount(value: float) -> str:
    """Hours or units with as many figures as tell something."""
    if value == 0:
        return "0"
    if value < 0.1:
        return f"{value:.2g}"
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}"


def _tiles(report: Report) -> Iterator[tuple[str, str]]:
    """(figure, what it is)."""
    progress, spent = report.status.progress, report.spent
    if progress.iteration is not None:
        share = f" of {progress.target:,}" if progress.target else ""
        yield f"{progress.iteration:,}{share}", "iterations"
    losses = report.diagnosis.progress
    if losses.get("first_loss") is not None:
        yield (
            f"{figure(losses['first_loss'])} → {figure(losses.get('last_loss'))}",
            "loss, first to last",
        )
    if spent is not None:
        if spent.used.gpu_hours:
            yield _amount(spent.used.gpu_hours), "GPU-hours, as Slurm counts GPUs"
        else:
            yield _amount(spent.used.node_hours), "node-hours"
        if spent.used.billed is not None:
            yield _amount(spent.used.billed), f"{spent.used.unit}s billed"
    if report.efficiency is not None:
        yield f"{100 * report.efficiency:.0f}%", "efficiency: productive of allocated time"
    lost = sum(row.lost_iterations for row in report.rows)
    yield (
        f"{lost:,}" + (f" ({format_duration(report.lost_s)})" if report.lost_s else ""),
        "iterations lost",
    )
    if progress.eta_s:
        links = "" if progress.links_needed is None else f", {progress.links_needed} links"
        yield format_duration(progress.eta_s) + links, "of running still needed"


def _start(row: AttemptRow) -> tuple[str, ...]:
    ended = (
        row.state or _NO_STEP.get(row.mode or ""),
        FAILURES[row.cause].title if row.cause else "",
        row.node,
    )
    billed = row.bill.billed if row.bill else None
    return (
        "" if row.link is None else str(row.link),
        row.job_id + (f" restart {row.restart}" if row.restart else ""),
        row.mode or "",
        _listed(*ended),
        utc(row.start_s) or "",
        "" if row.elapsed_s is None else format_duration(row.elapsed_s),
        "" if row.first_iteration is None else f"{row.first_iteration}–{row.last_iteration}",
        str(row.lost_iterations or ""),
        _amount(row.bill.gpu_hours) if row.bill else "",
        "" if billed is None else _amount(billed),
    )


def _incident(incident: Incident) -> tuple[str, ...]:
    event, attempt = incident.event, incident.attempt
    return (
        "" if attempt.link is None else str(attempt.link),
        attempt.job_id or "",
        FAILURES[event.failure].title,
        event.node or "",
        "" if event.rank is None else str(event.rank),
        "a later start went on" if incident.recovered else "not yet",
        event.text,
    )


def _cadence(cadence: Mapping[str, Any]) -> str:
    """How often the run saves beside the interval that loses least (Young 1974, Daly 2006)."""
    interval, best = cadence.get("interval_s"), cadence.get("best_s")
    if best is None:
        return "plan.json does not tell the number of nodes"
    measured = cadence.get("save_measured")
    iterations = cadence.get("best_iterations")
    basis = (
        f"the interval that loses least is {format_duration(best)}"
        f" {f'(about {iterations:,} iterations) ' if iterations else ''}for saves of"
        f" {cadence['save_time_s']:.2g} s{'' if measured else ' (assumed: the logs do not tell)'}"
        f" and a node failure every {format_duration(cadence['mttf_s'])} on these nodes"
        " (Young–Daly)"
    )
    if interval is None:
        return f"How often this run saves is not known; {basis}."
    saved = cadence["save_time_s"] / (interval + cadence["save_time_s"])
    share = f" Saving takes {100 * saved:.2g}% of the time." if measured else ""
    every = f"A checkpoint every {cadence['save_every']:,} iterations, {format_duration(interval)}"
    return f"{every}: {_judged(interval / best)}; {basis}.{share}"


def _judged(ratio: float) -> str:
    if ratio > 2:
        return "rarer than that: more is lost per failure"
    if ratio < 0.5:
        return "more often than failures ask for, which costs only the time of the saves"
    return "close to it"


def _notes(report: Report) -> Iterator[str]:
    yield from report.status.notes
    yield from report.diagnosis.remarks
    yield from (f"could not see: {what}" for what in report.unseen)
    if report.points.every > 1:
        yield f"the curves show one step line in {report.points.every}"
