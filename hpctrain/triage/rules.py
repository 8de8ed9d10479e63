"""The verdicts: GREEN, RED or NOT OBSERVED per rule, from what the engine kept. A rule that saw no
data never passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpctrain.base.units import format_duration
from hpctrain.triage.attempt import Attempt, Series
from hpctrain.triage.records import Event, Place, median
from hpctrain.triage.thresholds import Thresholds

GREEN, RED, NOT_OBSERVED = "GREEN", "RED", "NOT OBSERVED"


@dataclass(frozen=True)
class Verdict:
    """One rule's answer: what was seen, the line that shows it, and whether it may be passed
    over."""

    rule: str
    verdict: str
    detail: str
    place: Place | None = None
    text: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "verdict": self.verdict,
            "detail": self.detail,
            "file": self.place.file if self.place else None,
            "line": self.place.number if self.place else None,
            "text": self.text,
        }


@dataclass(frozen=True)
class Circumstances:
    """What the log cannot tell. `running`: whether the job still runs (None: unknown). Times: UTC
    seconds since 1970.

    `silent_s`: how long the log has not grown, for a running job; `ended_s`: when it ended, in the
    clock of the log.
    """

    running: bool | None = None
    silent_s: float | None = None
    ended_s: float | None = None


# Rules that look at how a job failed, and the classes of `failures` each looks for.
FAILURE_RULES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("gpu_memory", "a GPU ran out of memory", ("gpu_oom",)),
    ("host_memory", "the host ran out of memory", ("host_oom", "killed")),
    ("disk", "disk, quota or shared memory full", ("disk",)),
    ("gpu", "a GPU or its driver failed", ("gpu_fault",)),
    ("communication", "NCCL, RCCL or the rendezvous failed", ("communication",)),
    ("filesystem", "the file system failed", ("filesystem",)),
    ("node", "a node failed", ("node",)),
    ("time_limit", "the time limit came", ("time_limit",)),
    ("preemption", "preempted, requeued or cancelled", ("preemption", "cancelled")),
    (
        "program",
        "the program failed",
        (
            "program",
            "crash",
            "environment",
            "config",
            "missing_file",
            "checkpoint",
            "nonfinite",
            "gave_up",
            "refused",
        ),
    ),
)


def health(attempt: Attempt, first: Attempt) -> list[Verdict]:
    """The rules on the figures of a run. `attempt` is the latest one with steps, `first` the first
    with steps."""
    t = attempt.thresholds
    return [
        _loss_finite(attempt),
        _loss_trend(first, t),
        _loss_rise(attempt, t),
        _gradients(attempt, t),
        _skipped(attempt),
        _throughput(attempt, t),
    ]


def _loss_finite(attempt: Attempt) -> Verdict:
    loss, zero = attempt.loss, attempt.zero_loss
    if not loss.seen and not attempt.nan_iterations:
        return Verdict("loss_finite", NOT_OBSERVED, "no line with a loss")
    if loss.first_bad:
        place = loss.first_bad[0]
        return Verdict(
            "loss_finite",
            RED,
            f"NaN or Inf in {loss.bad} of {loss.seen} step lines, first here",
            place,
        )
    if attempt.nan_iterations:
        return Verdict(
            "loss_finite",
            RED,
            f"{attempt.nan_iterations} iterations with NaN or Inf",
            attempt.nan_first,
        )
    if zero.worst_row >= attempt.thresholds.in_a_row and zero.worst_row_start:
        return Verdict(
            "loss_finite",
            RED,
            f"the loss is exactly 0 in {zero.worst_row} step lines in a row: no label is trained,"
            " or NaN hides behind it",
            zero.worst_row_start[0],
        )
    return Verdict("loss_finite", GREEN, f"{loss.seen} losses, all finite", attempt.last_place)


def loss_drop(first: Attempt, thresholds: Thresholds) -> float | None:
    """By which fraction the loss fell over the first `loss_steps` steps; None when they were not
    seen."""
    start, end = _both_ends(first, thresholds)
    if not start or not end:
        return None
    before, after = sum(start) / len(start), sum(end) / len(end)
    return (before - after) / abs(before) if before else 0.0


def _both_ends(first: Attempt, thresholds: Thresholds) -> tuple[list[float], list[float]]:
    """The losses of the first steps and those around step `loss_steps`."""
    steps = thresholds.loss_steps
    if first.mode == "resume":
        return [], []
    start = [loss for since, loss in first.early if since <= 0.05 * steps][:5]
    end = [loss for since, loss in first.early if 0.9 * steps <= since <= 1.1 * steps]
    return start, end or [loss for since, loss in first.early if since >= 0.9 * steps][:1]


_FLAT = 0.005  # a fall by less is looked at twice


def _falls(first: Attempt, t: Thresholds) -> bool:
    """Whether the losses of the first steps fall by more than chance would have it: the t value of
    their slope."""
    points = [(float(since), loss) for since, loss in first.early if since <= 1.1 * t.loss_steps]
    count = len(points)
    if count < 10:
        return True  # too few to call anything noise
    x_mean, y_mean = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / spread if spread else 0.0
    rest = sum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in points) / (count - 2)
    return slope < 0 and (rest == 0 or -slope > 3 * math.sqrt(rest / spread))


def _loss_trend(first: Attempt, t: Thresholds) -> Verdict:
    if not first.early:
        return Verdict("loss_trend", NOT_OBSERVED, "no line with a finite loss")
    if first.mode == "resume":
        return Verdict(
            "loss_trend",
            NOT_OBSERVED,
            f"the logs begin with a resume, not with the first {t.loss_steps} steps",
        )
    drop = loss_drop(first, t)
    if drop is None:
        return Verdict(
            "loss_trend",
            NOT_OBSERVED,
            f"fewer than {t.loss_steps} steps: {first.early[-1][0] + 1} seen",
        )
    place = Place(first.file, first.last_place.number) if first.last_place else None
    if first.early[0][1] <= 0:
        return Verdict(
            "loss_trend",
            NOT_OBSERVED,
            "the first loss is not above 0: a policy's loss, which need not fall",
        )
    if drop <= t.loss_drop:
        way = "higher" if drop < 0 else "lower"
        change = f"{_percent(abs(drop))} {way}" if drop else "the same"
        return Verdict(
            "loss_trend",
            RED,
            f"after {t.loss_steps} steps the loss is {change}: it does not fall",
            place,
        )
    if drop < _FLAT and not _falls(first, t):
        detail = (
            f"after {t.loss_steps} steps the loss is the same but for noise ({_percent(drop)}"
            " lower): it does not fall"
        )
        return Verdict("loss_trend", RED, detail, place)
    note = (
        ""
        if drop >= t.loss_drop_to_scale
        else f", less than the {_percent(t.loss_drop_to_scale)} that make scaling up safe"
    )
    return Verdict(
        "loss_trend",
        GREEN,
        f"the loss fell by {_percent(drop)} in {t.loss_steps} steps{note}",
        place,
    )


_FEW = 5  # losses in a row that are no accident


def _loss_rise(attempt: Attempt, t: Thresholds) -> Verdict:
    losses, first = attempt.losses, attempt.first
    if first and first.loss is not None and first.loss > 0 and losses.seen >= 2 * _FEW:
        now = min(losses.values[-_FEW:])
        if now > 1.5 * t.loss_rise * first.loss and now - first.loss > 1:
            return Verdict(
                "loss_rise",
                RED,
                f"recent loss {now:.4g}, the first was {first.loss:.4g}: it diverges",
                attempt.last_place,
            )
    if losses.best is None or losses.seen < 2 * losses.size:
        return Verdict(
            "loss_rise", NOT_OBSERVED, f"fewer than {2 * losses.size} step lines with a loss"
        )
    now, best = median(losses.last()), losses.best
    where = f" at iteration {losses.best_at}" if losses.best_at is not None else ""
    detail = f"recent loss {now:.4g}, lowest {best:.4g}{where}"
    # Near zero a factor says nothing; a tenth of a nat is noise.
    if now > t.loss_rise * best and now - best > 0.1 and best > 0:
        return Verdict("loss_rise", RED, f"{detail}: it diverges", attempt.last_place)
    return Verdict("loss_rise", GREEN, detail, attempt.last_place)


def _gradients(attempt: Attempt, t: Thresholds) -> Verdict:
    big, zero, bad = attempt.grad_big, attempt.grad_zero, attempt.grad_bad
    if not bad.seen:
        why = (
            " (DeepSpeed prints none)"
            if attempt.framework in ("open-instruct", "neox", "deepspeed")
            else ""
        )
        return Verdict("gradients", NOT_OBSERVED, f"no line with a gradient norm{why}")
    if bad.first_bad:
        return Verdict(
            "gradients",
            RED,
            f"NaN or Inf in {bad.bad} of {bad.seen} gradient norms, first here",
            bad.first_bad[0],
        )
    explosive = _row(big, t.in_a_row)
    if explosive:
        return Verdict(
            "gradients",
            RED,
            f"gradient norm up to {big.highest:.3g}, above {t.grad_norm_max:g} {explosive}",
            big.worst_row_start[0] if big.worst_row_start else None,
        )
    vanished = _row(zero, t.in_a_row)
    if vanished:
        return Verdict(
            "gradients",
            RED,
            f"gradient norm exactly 0 {vanished}",
            zero.worst_row_start[0] if zero.worst_row_start else None,
        )
    middle = median(attempt.norms.last())
    notes = (
        ""
        if t.grad_norm_low <= middle <= t.grad_norm_high
        else f", outside {t.grad_norm_low:g} to {t.grad_norm_high:g}"
    )
    if big.first_bad:
        notes += f"; spiked to {big.highest:.3g} at {big.first_bad[0]} and came back"
    return Verdict(
        "gradients", GREEN, f"gradient norm around {middle:.3g}{notes}", attempt.last_place
    )


def _row(series: Series, in_a_row: int) -> str:
    if series.worst_row >= in_a_row:
        return f"in {series.worst_row} step lines in a row"
    if series.bad_in_a_row and series.bad_in_a_row == series.seen:
        return "in every step line"
    return "at the end" if series.bad_in_a_row else ""


def _skipped(attempt: Attempt) -> Verdict:
    if not attempt.counts_skipped:
        return Verdict("skipped_steps", NOT_OBSERVED, "no line counts skipped iterations")
    grace = attempt.thresholds.skipped_grace
    if attempt.skipped_at_minimum:
        detail = (
            f"{attempt.skipped_at_minimum} iterations without an update at the lowest loss scale"
        )
        return Verdict("skipped_steps", RED, detail, attempt.skipped_first)
    later = (attempt.iterations_seen or attempt.num_steps) - grace
    if attempt.skipped and attempt.skipped <= attempt.thresholds.skipped_share * later:
        detail = (
            f"{attempt.skipped} of {later} iterations without an update, as fp16's loss scale now"
            " and then asks for"
        )
        return Verdict("skipped_steps", GREEN, detail, attempt.skipped_first)
    if attempt.skipped:
        return Verdict(
            "skipped_steps",
            RED,
            f"{attempt.skipped} iterations without an update after the first {grace}",
            attempt.skipped_first,
        )
    return Verdict(
        "skipped_steps", GREEN, "no iteration was skipped after the start", attempt.last_place
    )


def _throughput(attempt: Attempt, t: Thresholds) -> Verdict:
    rates = attempt.rates
    if rates.best is None or rates.seen < 2 * rates.size:
        what = (
            f"{rates.seen} step lines with a rate, {2 * rates.size} are needed"
            if rates.seen
            else "no line with a rate"
        )
        return Verdict("throughput", NOT_OBSERVED, what)
    now, best = median(rates.last()), rates.best
    detail = f"{now:.4g} {attempt.rate_unit} now, {best:.4g} at best"
    if now <= 0 or now < t.throughput_drop * best:
        return Verdict(
            "throughput",
            RED,
            f"{detail}: {_percent(1 - now / best)} slower; a slow node or file system?",
            attempt.last_place,
        )
    return Verdict("throughput", GREEN, detail, attempt.last_place)


def hang(attempt: Attempt, around: Circumstances) -> Verdict:
    """No step line for max(hang_factor x median step, hang_min_s) while the job ran, unless in a
    known quiet phase."""
    t = attempt.thresholds
    steps = attempt.step_times.last()
    step_s = median(steps) if steps else _mean_step_s(attempt)
    limit = max(t.hang_factor * step_s if step_s else 0.0, t.hang_min_s)
    if not attempt.num_steps:
        limit = max(limit, t.startup_s)
    silence = _silence(attempt, around)
    if attempt.reached_end or attempt.exit_code == 0:
        return Verdict("hang", GREEN, "the step came to its end", attempt.last_place)
    if silence is None:
        return Verdict(
            "hang",
            NOT_OBSERVED,
            "no times in the log by which to tell a silence",
            attempt.last_place,
        )
    what = "step line" if attempt.num_steps else "first step line"
    detail = f"no {what} in the last {format_duration(silence)} (limit {format_duration(limit)})"
    if silence <= limit:
        if not attempt.num_steps:
            return Verdict(
                "hang",
                NOT_OBSERVED,
                f"no step line yet, {format_duration(silence)} after the start",
            )
        return Verdict("hang", GREEN, detail, attempt.last_place)
    if attempt.quiet_phase:
        return Verdict(
            "hang",
            NOT_OBSERVED,
            f"{detail}, while the log says `{attempt.quiet_phase}`: a quiet phase",
            attempt.last_place,
        )
    return Verdict("hang", RED, detail, attempt.last_place)


def _mean_step_s(attempt: Attempt) -> float | None:
    first, last = attempt.first, attempt.last
    start, end = attempt.first_step_time_s, attempt.last_step_time_s
    if (
        first
        and last
        and start is not None
        and end is not None
        and end > start
        and attempt.num_steps > 2
    ):
        count = (last.iteration or 0) - (first.iteration or 0)
        return (end - start) / count if count > 0 else None
    return None


def _silence(attempt: Attempt, around: Circumstances) -> float | None:
    """Seconds between the last step line and the end (or now); None when nothing tells."""
    if around.running:
        return around.silent_s
    if attempt.last_step_time_s is None:
        return None
    ends = [time_s for time_s in (attempt.last_time_s, around.ended_s) if time_s is not None]
    return max(max(ends) - attempt.last_step_time_s, 0.0) if ends else None


def failure_rules(
    attempt: Attempt, cause: Event | None, recovered: Callable[[Event], bool]
) -> list[Verdict]:
    """One verdict per kind of failure for the latest attempt; `recovered` tells events that
    training survived."""
    seen_something = bool(attempt.num_steps) or attempt.exit_code == 0 or bool(attempt.finished)
    out = []
    for rule, title, names in FAILURE_RULES:
        events = sorted(
            (event for name in names for event in attempt.events.get(name, ())),
            key=lambda event: event.order,
        )
        # What was only said in passing counts where it is all there is.
        aside = [
            event for event in events if event.weak and not (cause and event.order == cause.order)
        ]
        events = [event for event in events if event not in aside]
        fatal = [event for event in events if not recovered(event)]
        if cause is not None and any(event.order == cause.order for event in events):
            out.append(Verdict(rule, RED, title, cause.place, cause.text))
        elif fatal and cause is not None:
            detail = f"{title}, most likely because of the cause ({cause.failure})"
            out.append(Verdict(rule, NOT_OBSERVED, detail, fatal[0].place, fatal[0].text))
        elif fatal and not attempt.reached_end:
            out.append(Verdict(rule, RED, title, fatal[0].place, fatal[0].text))
        elif events:
            count = max(
                sum(attempt.event_counts.get(name, 0) for name in names) - len(aside), len(events)
            )
            out.append(
                Verdict(
                    rule,
                    GREEN,
                    f"{count} such lines, and training went on",
                    events[0].place,
                    events[0].text,
                )
            )
        elif seen_something:
            out.append(Verdict(rule, GREEN, "no such line"))
        else:
            out.append(Verdict(rule, NOT_OBSERVED, "the log shows no training"))
    return out


def ending(attempt: Attempt, around: Circumstances, cause: Event | None) -> Verdict:
    """How the latest attempt ended, or that it runs."""
    if attempt.exit_code not in (0, None):
        return Verdict(
            "ending",
            RED,
            f"the job ended with exit code {attempt.exit_code}",
            cause.place if cause else None,
        )
    if cause is not None:
        return Verdict("ending", RED, "it ended by a failure", cause.place, cause.text)
    if attempt.finished:
        return Verdict("ending", GREEN, attempt.finished)
    if attempt.reached_end:
        return Verdict("ending", GREEN, f"all {attempt.total} iterations")
    if attempt.exit_code == 0:
        return Verdict("ending", GREEN, "exit code 0")
    if around.running:
        return Verdict("ending", NOT_OBSERVED, "it is running")
    return Verdict("ending", NOT_OBSERVED, "the log has no end")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%" if math.isfinite(fraction) else "NaN"
