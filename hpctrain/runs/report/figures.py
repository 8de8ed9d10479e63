"""The report's drawings with matplotlib: curves over the whole chain and a time line, as SVG
without outside parts, or PNG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any, Optional

from hpctrain.base.errors import missing_package
from hpctrain.runs.report.gather import AttemptRow, Report

# Colours that people with the usual colour blindnesses tell apart (Okabe and Ito 2008).
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8a8f98"
_SEGMENTS = (("productive", GREEN), ("lost, done again", RED), ("start-up, saves, idle", "#d9dce1"))
_UNSPLIT = ("ran; the logs tell no step time", "#a9bdd6")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise missing_package("matplotlib", "report") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Text as paths: the page then needs no font; the fixed salt makes equal drawings equal bytes.
    plt.rcParams.update(
        {
            "svg.fonttype": "path",
            "svg.hashsalt": "hpctrain",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#eceef1",
            "axes.edgecolor": "#8a8f98",
            "figure.autolayout": False,
            "axes.axisbelow": True,
        }
    )
    return plt


Pick = Callable[[Any], Optional[float]]


def _panels(report: Report) -> list[tuple[str, Pick]]:
    unit, rate = _rate(report)
    return [
        ("loss", lambda step: step.loss),
        ("learning rate", lambda step: step.lr),
        ("gradient norm", lambda step: step.grad_norm),
        (unit, rate),
    ]


def _told(report: Report, pick: Pick) -> bool:
    return any(pick(step) is not None for _, step, _ in report.points.rows)


def missing(report: Report) -> list[str]:
    """What the curves cannot show, because no line of the logs tells it."""
    names = [("speed" if "/s" in title else title, pick) for title, pick in _panels(report)]
    return [title for title, pick in names if not _told(report, pick)]


def curves(report: Report) -> Any:
    """Loss, learning rate, gradient norm and speed over iterations, those that the logs tell; links
    bounded by lines, lost work shaded."""
    plt = _pyplot()
    panels = [panel for panel in _panels(report) if _told(report, panel[1])] or _panels(report)[:1]
    ratios = [2, *([1] * (len(panels) - 1))]
    figure, found = plt.subplots(
        len(panels),
        1,
        figsize=(10, 0.9 + 1.66 * sum(ratios)),
        sharex=True,
        height_ratios=ratios,
        squeeze=False,
    )
    axes = found[:, 0]
    for axis, (title, pick) in zip(axes, panels):
        drawn = _panel(axis, report, pick)
        axis.set_ylabel(title)
        if not drawn:
            axis.text(
                0.5,
                0.5,
                "not in the logs",
                transform=axis.transAxes,
                ha="center",
                va="center",
                color=GREY,
            )
            axis.set_yticks([])
    _boundaries(axes, report)
    if panels[0][0] == "loss":
        _clip_spikes(axes[0], report)
    axes[-1].set_xlabel("iteration")
    figure.align_ylabels(axes)
    figure.tight_layout()
    return figure


def _panel(axis: Any, report: Report, pick: Callable[[Any], float | None]) -> bool:
    """One line a start of a job, so that work done twice is seen twice; values that are not finite
    as red crosses."""
    series: dict[int, tuple[list[float], list[float]]] = {}
    bad: list[float] = []
    for number, (attempt, step, _) in enumerate(report.points.rows):
        value = pick(step)
        if value is None:
            continue
        where = step.iteration if step.iteration is not None else number
        if not math.isfinite(value):
            bad.append(where)
            continue
        xs, ys = series.setdefault(id(attempt), ([], []))
        xs.append(where)
        ys.append(value)
    for index, (xs, ys) in enumerate(series.values()):
        axis.plot(
            xs,
            ys,
            color=BLUE if index % 2 == 0 else ORANGE,
            linewidth=1.1,
            marker="." if len(xs) < 3 else None,
        )
    if bad:
        axis.plot(
            bad,
            [0.04] * len(bad),
            "x",
            color=RED,
            transform=axis.get_xaxis_transform(),
            markersize=6,
            label="NaN or Inf",
        )
        axis.legend(loc="upper right", frameon=False)
    axis.margins(x=0.01)
    return bool(series or bad)


def _boundaries(axes: Any, report: Report) -> None:
    for index, row in enumerate(report.rows):
        if row.first_iteration is None or row.last_iteration is None:
            continue
        for axis in axes:
            if index:
                axis.axvline(row.first_iteration, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
            if row.lost_iterations:
                axis.axvspan(
                    row.last_iteration - row.lost_iterations + 1,
                    row.last_iteration,
                    color=RED,
                    alpha=0.13,
                    linewidth=0,
                )
    groups = _labels(report)
    for where, label in groups if len(groups) <= 12 else []:
        axes[0].annotate(
            label,
            (where, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 2),
            textcoords="offset points",
            color="#4a4f57",
            fontsize=8,
            rotation=0 if len(groups) <= 6 else 30,
        )


def _labels(report: Report) -> list[tuple[int, str]]:
    """Where starts begin and their names; those that begin close together share a label."""
    shown = sorted(
        (row.first_iteration, index, row)
        for index, row in enumerate(report.rows)
        if row.first_iteration is not None
    )
    reach = max((row.last_iteration or 0 for _, _, row in shown), default=0)
    near = 0.08 * max(reach - (shown[0][0] if shown else 0), 1)
    out: list[tuple[int, list[AttemptRow]]] = []
    for where, _, row in shown:
        if out and where - out[-1][0] < near:
            out[-1][1].append(row)
        else:
            out.append((where, [row]))
    return [(where, _names(rows)) for where, rows in out]


def _names(rows: list[AttemptRow]) -> str:
    links = list(dict.fromkeys(row.link for row in rows))
    if len(rows) == 1 or None in links:
        return ", ".join(_name(row) for row in rows[:3]) + (" …" if len(rows) > 3 else "")
    times = f" ({len(rows)} starts)" if len(rows) > len(links) else ""
    return f"link{'s' if len(links) > 1 else ''} {', '.join(map(str, links))}{times}"


def _clip_spikes(axis: Any, report: Report) -> None:
    """A diverged loss must not flatten the rest: the axis ends at four times the first losses, or
    the middle of all."""
    losses = [
        step.loss
        for _, step, _ in report.points.rows
        if step.loss is not None and math.isfinite(step.loss)
    ]
    if len(losses) < 20:
        return
    everything = sorted(losses)
    limit = 4 * max(*map(abs, losses[:5]), abs(everything[len(losses) // 2])) + 1e-12
    if everything[-1] > limit:
        axis.set_ylim(top=limit)
        axis.text(
            0.99,
            0.94,
            f"cut off: up to {everything[-1]:.3g}",
            transform=axis.transAxes,
            ha="right",
            color=RED,
        )


def _rate(report: Report) -> tuple[str, Callable[[Any], float | None]]:
    steps = [step for _, step, _ in report.points.rows[:2000]]
    if any(step.tokens_per_s is not None for step in steps):
        return "tokens/s", lambda step: step.tokens_per_s
    if any(step.samples_per_s is not None for step in steps):
        return "samples/s", lambda step: step.samples_per_s
    return "steps/s", lambda step: 1 / step.step_time_s if step.step_time_s else None


def timeline(report: Report) -> Any | None:
    """When each start of each job ran (UTC), and what of it counts; None where no time is known."""
    rows = [row for row in report.rows if row.start_s is not None and row.elapsed_s is not None]
    if not rows:
        return None
    plt = _pyplot()
    rows = rows[-40:]
    figure, axis = plt.subplots(figsize=(10, 0.9 + 0.32 * len(rows)))
    import datetime

    from matplotlib import dates as plain_dates

    dates: Any = plain_dates

    for height, row in enumerate(rows):
        assert row.start_s is not None and row.elapsed_s is not None
        at = row.start_s
        for seconds, (_, colour) in _segments(row):
            begin = dates.date2num(datetime.datetime.fromtimestamp(at, datetime.timezone.utc))
            axis.barh(height, seconds / 86400, left=begin, color=colour, height=0.62, linewidth=0)
            at += seconds
    axis.set_yticks(range(len(rows)), [_name(row) for row in rows])
    axis.invert_yaxis()
    axis.xaxis_date(tz=datetime.timezone.utc)
    locator = dates.AutoDateLocator(tz=datetime.timezone.utc)
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator, tz=datetime.timezone.utc))
    axis.set_xlabel("time (UTC)")
    used = {kind for row in rows for seconds, kind in _segments(row) if seconds}
    kinds = [kind for kind in (*_SEGMENTS, _UNSPLIT) if kind in used] or [_SEGMENTS[-1]]
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour, linewidth=0) for _, colour in kinds]
    axis.legend(
        handles,
        [name for name, _ in kinds],
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=4,
        frameon=False,
    )
    axis.grid(axis="y", visible=False)
    figure.tight_layout()
    return figure


def _segments(row: AttemptRow) -> list[tuple[float, tuple[str, str]]]:
    """(seconds, (name, colour)) of what a start's time went into."""
    elapsed = row.elapsed_s or 0.0
    if row.productive_s is None and row.first_iteration is not None:
        return [(elapsed, _UNSPLIT)]
    productive = min(row.productive_s or 0.0, elapsed)
    lost = min(row.lost_s or 0.0, elapsed - productive)
    return list(zip((productive, lost, max(elapsed - productive - lost, 0.0)), _SEGMENTS))


def _name(row: AttemptRow) -> str:
    text = f"link {row.link}" if row.link is not None else f"job {row.job_id}"
    return text + (f", restart {row.restart}" if row.restart else "")


def svg(figure: Any) -> str:
    """The drawing as an `<svg>` element for a page: no prolog, no date, nothing from outside."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        r'<svg viewBox="\1" role="img" xmlns="http://www.w3.org/2000/svg"'
        r' xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
        count=1,
    )


def png(figure: Any, dots_per_inch: int = 110) -> bytes:
    """The drawing as PNG bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dots_per_inch, metadata={"Software": None})
    return out.getvalue()


def close(*figures: Any) -> None:
    """Give the drawings' memory back."""
    plt = _pyplot()
    for figure in figures:
        if figure is not None:
            plt.close(figure)
