"""The report as one HTML page that needs nothing else: style, drawings and figures inside it; every value escaped."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from hpctrain import __version__
from hpctrain.base.units import format_duration
from hpctrain.runs.report import figures
from hpctrain.runs.report.gather import Report
from hpctrain.triage.failures import FAILURES
from hpctrain.triage.records import utc
from hpctrain.triage.rules import GREEN, RED

MARK = "<!-- hpctrain report -->"
_STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}body{margin:0;background:#f4f5f7;color:#1d2129;font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}h1{font-size:26px;margin:0 0 2px}h2{font-size:17px;margin:34px 0 10px}
.sub{color:#5b616b;margin:0 0 18px}.card{background:#fff;border:1px solid #e3e5e9;border-radius:8px;padding:16px 18px;overflow-x:auto}
.verdict{border-left:6px solid #8a8f98}.verdict.GREEN{border-left-color:#009E73}.verdict.RED{border-left-color:#D55E00}.verdict b{font-size:17px}
.verdict p{margin:6px 0 0}.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin-top:16px}
.tile{background:#fff;border:1px solid #e3e5e9;border-radius:8px;padding:12px 14px}.tile .v{font-size:21px;font-weight:600}.tile .k{color:#5b616b;font-size:13px}
table{border-collapse:collapse;width:100%;font-size:13.5px}th{text-align:left;color:#5b616b;font-weight:600;border-bottom:2px solid #e3e5e9}
td,th{padding:5px 10px 5px 0;vertical-align:top}td{border-bottom:1px solid #eef0f2}td.n,th.n{text-align:right;white-space:nowrap}
code{font:12.5px ui-monospace,SFMono-Regular,Menlo,monospace;overflow-wrap:anywhere}.tag{font-weight:600;white-space:nowrap}.tag.RED{color:#b34700}.tag.GREEN{color:#00795a}.tag.NOT{color:#5b616b}
svg{width:100%;height:auto;display:block}ul{margin:0;padding-left:20px}footer{color:#5b616b;font-size:13px;margin-top:34px}
@media print{body{background:#fff}.card,.tile{break-inside:avoid}}
"""


def page(report: Report, curves_svg: str, timeline_svg: str | None) -> str:
    """The whole page."""
    run = report.run
    site, recipe = run.plan.get("site"), run.recipe
    facts = ", ".join(
        str(value) for value in (recipe and f"recipe {recipe}", site and f"site {site}", run.run_dir) if value
    )
    body = [
        f"<h1>{escape(run.name)}</h1>",
        f'<p class="sub">{escape(facts)}<br>state: {escape(report.status.state)}; made {utc(report.made_s)}, all times in UTC</p>',
        _verdict(report), _tiles(report),
        "<h2>Training</h2>", f'<div class="card">{curves_svg}{_caption(report)}</div>',
        "<h2>When it ran</h2>",
        f'<div class="card">{timeline_svg or "<p>no start of a job with a known duration</p>"}</div>',
        "<h2>Links</h2>", f'<div class="card">{_attempts(report)}</div>',
        "<h2>What triage says</h2>", f'<div class="card">{_rules(report)}</div>',
        *_incidents(report), "<h2>Checkpoint cadence</h2>", f'<div class="card">{_cadence(report)}</div>', *_unseen(report),
        f"<footer>hpctrain {escape(__version__)}. Lost work is what a later start did again, or what no complete checkpoint holds. "
        "Efficiency is the time of iterations that count over the time that jobs ran.</footer>",
    ]  # fmt: skip
    return _whole(run.name, body)


def pipeline_page(name: str, rows: Sequence[Mapping[str, Any]], folder: str) -> str:
    """The page of a pipeline that lies in `folder`: its stages in order, each with a link to its own page.

    A row has `stage`, `run`, `state`, `from`, `hand_over`, `got`, `iteration`, `target` and `page` (None where there is none).
    """
    cells = []
    for row in rows:
        shown = escape(str(row["stage"]))
        if row["page"]:
            href = escape(quote(os.path.relpath(row["page"], folder)), quote=True)
            shown = f'<a href="{href}">{shown}</a>'
        got = f"{row['got'] or row['hand_over']} of stage {row['from']}" if row["from"] else ""
        at = "" if row["iteration"] is None else f"{row['iteration']} of {row['target'] or 'an unknown number'}"
        cells.append(
            f"<tr><td>{shown}</td><td>{escape(str(row['run']))}</td><td>{escape(str(row['state']))}</td>"
            f"<td><code>{escape(got)}</code></td><td>{escape(at)}</td></tr>"
        )
    table = "<table><tr><th>stage</th><th>run</th><th>state</th><th>gets</th><th>iteration</th></tr>" + "".join(cells)
    body = [f"<h1>{escape(name)}</h1>", '<p class="sub">a pipeline; each stage has a page of its own</p>', f'<div class="card">{table}</table></div>',
            f"<footer>hpctrain {escape(__version__)}</footer>"]  # fmt: skip
    return _whole(name, body)


def _whole(name: str, body: Sequence[str]) -> str:
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(name)}: hpctrain report</title><style>{_STYLE}</style></head>\n{MARK}\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _verdict(report: Report) -> str:
    diagnosis = report.diagnosis
    lines = [
        f'<div class="card verdict {escape(diagnosis.verdict.split()[0])}"><b>{escape(diagnosis.verdict)}</b>: {escape(diagnosis.summary)}'
    ]
    if diagnosis.cause:
        event = diagnosis.cause.event
        who = ", ".join(
            filter(
                None,
                [f"rank {event.rank}" if event.rank is not None else "", f"node {event.node}" if event.node else ""],
            )
        )
        lines.append(f"<p>cause: <code>{escape(str(event.place))}</code>{escape(' (' + who + ')') if who else ''}</p>")
    before = [incident for incident in diagnosis.incidents if incident is not diagnosis.cause]
    if before:
        counted = Counter(FAILURES[incident.event.failure].title for incident in before)
        names = ", ".join(f"{name} ({count} times)" if count > 1 else name for name, count in counted.items())
        went_on = "a later start went on" if all(incident.recovered for incident in before) else "see Failures"
        lines.append(f"<p>before that: {escape(names)}; {went_on}</p>")
    lines.append(f"<p>next: <b>{escape(diagnosis.action)}</b>: {escape(diagnosis.advice)}</p></div>")
    return "".join(lines)


def _caption(report: Report) -> str:
    notes = []
    if len([row for row in report.rows if row.first_iteration is not None]) > 1:
        notes.append("Each colour is one start of a job; a dashed line is where one begins.")
    if any(row.lost_iterations for row in report.rows):
        notes.append("Shaded: iterations that a later start did again, or that no checkpoint holds.")
    if absent := figures.missing(report):
        notes.append(f"Not in the logs: {', '.join(absent)}.")
    return f'<p class="sub">{escape(" ".join(notes))}</p>' if notes else ""


def _amount(value: float) -> str:
    """Hours or units with as many figures as tell something."""
    return "0" if value == 0 else f"{value:.2g}" if value < 0.1 else f"{value:,.{2 if value < 10 else 1}f}"


def _tiles(report: Report) -> str:
    progress, spent = report.status.progress, report.spent
    tiles = []
    if progress.iteration is not None:
        share = f" of {progress.target:,}" if progress.target else ""
        tiles.append((f"{progress.iteration:,}{share}", "iterations"))
    first, last = report.diagnosis.progress.get("first_loss"), report.diagnosis.progress.get("last_loss")
    if first is not None:
        tiles.append((f"{_figure(first)} → {_figure(last)}", "loss, first to last"))
    if spent is not None:
        used = spent.used
        if used.gpu_hours:
            tiles.append((_amount(used.gpu_hours), "GPU-hours, as Slurm counts GPUs"))
        else:
            tiles.append((_amount(used.node_hours), "node-hours"))
        if used.billed is not None:
            tiles.append((_amount(used.billed), f"{used.unit}s billed"))
    if report.efficiency is not None:
        tiles.append((f"{100 * report.efficiency:.0f}%", "efficiency: productive of allocated time"))
    lost = sum(row.lost_iterations for row in report.rows)
    tiles.append((f"{lost:,}" + (f" ({format_duration(report.lost_s)})" if report.lost_s else ""), "iterations lost"))
    if progress.eta_s:
        links = f", {progress.links_needed} links" if progress.links_needed is not None else ""
        tiles.append((format_duration(progress.eta_s) + links, "of running still needed"))
    cells = "".join(
        f'<div class="tile"><div class="v">{escape(value)}</div><div class="k">{escape(name)}</div></div>'
        for value, name in tiles
    )
    return f'<div class="tiles">{cells}</div>'


_NO_STEP = {"done": "nothing left to do", "stopped": "stopped, as asked", "gave_up": "the chain gave up"}


def _attempts(report: Report) -> str:
    if not report.rows:
        return "<p>no job has started</p>"
    head = ("link", "job", "mode", "how it ended", "start", "ran", "iterations", "lost", "GPU-hours", "billed")
    rows = []
    for row in report.rows:
        span = f"{row.first_iteration}–{row.last_iteration}" if row.first_iteration is not None else ""
        ended = ", ".join(
            filter(
                None,
                [
                    row.state or _NO_STEP.get(row.mode or "", ""),
                    FAILURES[row.cause].title if row.cause else "",
                    row.node,
                ],
            )
        )
        billed = _amount(row.bill.billed) if row.bill and row.bill.billed is not None else ""
        rows.append((
            "" if row.link is None else str(row.link), row.job_id + (f" restart {row.restart}" if row.restart else ""), row.mode or "", ended,
            utc(row.start_s) or "", "" if row.elapsed_s is None else format_duration(row.elapsed_s), span,
            str(row.lost_iterations) if row.lost_iterations else "", _amount(row.bill.gpu_hours) if row.bill else "", billed,
        ))  # fmt: skip
    return _table(head, rows, numeric={5, 6, 7, 8, 9})


def _rules(report: Report) -> str:
    order = sorted(report.diagnosis.verdicts, key=lambda v: (v.verdict != RED, v.verdict == GREEN))
    rows = [
        f'<tr><td>{escape(v.rule)}</td><td class="tag {escape(v.verdict.split()[0])}">{escape(v.verdict)}</td><td>{escape(v.detail)}'
        + (f"<br><code>{escape(v.text)}</code>" if v.text else "")
        + f"</td><td><code>{escape(_short(v.place)) if v.place else ''}</code></td></tr>"
        for v in order
    ]
    return f"<table><tr><th>rule</th><th>verdict</th><th>what was seen</th><th>line</th></tr>{''.join(rows)}</table>"


def _incidents(report: Report) -> list[str]:
    if not report.diagnosis.incidents:
        return []
    rows = [
        (
            "" if i.attempt.link is None else str(i.attempt.link), i.attempt.job_id or "", FAILURES[i.event.failure].title, i.event.node or "",
            "" if i.event.rank is None else str(i.event.rank), "a later start went on" if i.recovered else "not yet", i.event.text,
        )
        for i in report.diagnosis.incidents
    ]  # fmt: skip
    head = ("link", "job", "failure", "node", "rank", "recovered", "line")
    return ["<h2>Failures</h2>", f'<div class="card">{_table(head, rows)}</div>']


def _cadence(report: Report) -> str:
    cadence = report.cadence
    interval, best = cadence.get("interval_s"), cadence.get("best_s")
    if best is None:
        return "<p>plan.json does not tell the number of nodes</p>"
    saves = f"saves of {cadence['save_time_s']:.2g} s" + (
        "" if cadence.get("save_measured") else " (assumed: the logs do not tell)"
    )
    basis = (
        f"the interval that loses least is {format_duration(best)} "
        + (f"(about {cadence['best_iterations']:,} iterations) " if cadence.get("best_iterations") else "")
        + f"for {saves} and a node failure every {format_duration(cadence['mttf_s'])} on these nodes (Young–Daly)"
    )
    if interval is None:
        return f"<p>How often this run saves is not known; {escape(basis)}.</p>"
    ratio = interval / best
    judgement = (
        "close to it"
        if 0.5 <= ratio <= 2
        else "rarer than that: more is lost per failure"
        if ratio > 2
        else "more often than failures ask for, which costs only the time of the saves"
    )
    saved = cadence["save_time_s"] / (interval + cadence["save_time_s"])
    share = f" Saving takes {100 * saved:.2g}% of the time." if cadence.get("save_measured") else ""
    return f"<p>A checkpoint every {cadence['save_every']:,} iterations, {escape(format_duration(interval))}: {judgement}; {escape(basis)}.{share}</p>"


def _unseen(report: Report) -> list[str]:
    notes = [*report.status.notes, *report.diagnosis.remarks, *(f"could not see: {what}" for what in report.unseen)]
    if report.points.every > 1:
        notes.append(f"the curves show one step line in {report.points.every}")
    return (
        ["<h2>Notes</h2>", '<div class="card"><ul>', *(f"<li>{escape(note)}</li>" for note in notes), "</ul></div>"]
        if notes
        else []
    )


def _table(
    head: tuple[str, ...], rows: Sequence[tuple[str, ...]], numeric: frozenset[int] | set[int] = frozenset()
) -> str:
    def cell(tag: str, index: int, text: str) -> str:
        style = ' class="n"' if index in numeric else ""
        return f"<{tag}{style}>{escape(text)}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", i, text) for i, text in enumerate(head)) + "</tr>"]
    lines += ["<tr>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _short(place: object) -> str:
    """The file's name and line, since the page says where the run is."""
    return str(place).rsplit("/", 1)[-1]


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
