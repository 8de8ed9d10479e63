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
    if zero.worst_row >= _no_accident(attempt) and zero.worst_row_start:
        return Verdict(
            "loss_finite",
            RED,
            f"the loss is exactly 0 in {zero.worst_row} step lines in a row: no label is trained,"
            " or NaN hides behind it",
            zero.worst_row_start[0],
        )
    return Verdict("loss_finite", GREEN, f"{loss.seen} losses, all finite", attempt.last_place)


def _no_accident(attempt: Attempt) -> int:
    """How many zeros in a row mean something: the groups of a policy's batch may all have one
    reward, and then there is nothing to learn from it."""
    return _NO_SIGNAL if attempt.objective == "policy" else attempt.thresholds.in_a_row


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
    if first.goes_on_from:
        return [], []
    start = [loss for since, loss in first.early if since <= 0.05 * steps][:5]
    end = [loss for since, loss in first.early if 0.9 * steps <= since <= 1.1 * steps]
    return start, end or [loss for since, loss in first.early if since >= 0.9 * steps][:1]


_FLAT = 0.01  # a fall of less than this fraction is none
_NO_SIGNAL = 20  # step lines of a policy without any gradient that are no accident


def _fall(first: Attempt, t: Thresholds) -> tuple[float, float] | None:
    """(by which fraction a line through the losses of the first steps falls, the error of that);
    None for too few."""
    points = [(float(since), loss) for since, loss in first.early if since <= 1.1 * t.loss_steps]
    count = len(points)
    if count < 5:
        return None
    x_mean, y_mean = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    if not spread or y_mean <= 0:
        return None
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / spread
    rest = sum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in points) / (count - 2)
    length = (points[-1][0] - points[0][0]) / y_mean
    return -slope * length, math.sqrt(rest / spread) * length * (1 + 3 / count)


def _no_trend(first: Attempt, t: Thresholds) -> str | None:
    """Why the first losses cannot tell whether the model learns; None where they can."""
    if not first.early:
        return "no line with a finite loss"
    if first.goes_on_from:
        return f"{first.goes_on_from}; the first {t.loss_steps} steps were not seen"
    if first.objective == "policy":
        return "a policy's loss, which need not fall"
    if loss_drop(first, t) is None:
        return f"fewer than {t.loss_steps} steps: {first.early[-1][0] + 1} seen"
    if first.early[0][1] <= 0:
        return "the first loss is not above 0: a policy's loss, which need not fall"
    return None


def _loss_trend(first: Attempt, t: Thresholds) -> Verdict:
    why = _no_trend(first, t)
    drop = loss_drop(first, t)
    if why or drop is None:
        return Verdict("loss_trend", NOT_OBSERVED, why or "")
    place = Place(first.file, first.last_place.number) if first.last_place else None
    after = f"after {t.loss_steps} steps the loss is"
    if t.loss_drop and drop <= t.loss_drop:
        detail = f"{after} {_percent(abs(drop))} {'lower' if drop > 0 else 'higher'}: too little"
        return Verdict("loss_trend", RED, detail, place)
    begun, now = first.early[0][1], min(loss for _, loss in first.early[-3:])
    if now > 1.5 * begun and now - begun > 1:
        return Verdict("loss_trend", RED, f"{after} {now:.4g}, the first was {begun:.4g}", place)
    fitted = _fall(first, t)
    fall, error = fitted or (drop, abs(drop))
    if fall < 3 * error and not _fell_later(first):
        if fall + 2 * error >= _FLAT:
            detail = f"{after} not lower, but the losses are too noisy or too few to tell"
            return Verdict("loss_trend", NOT_OBSERVED, detail, place)
        way = "the same but for noise" if abs(fall) < _FLAT else f"{_percent(-fall)} higher"
        return Verdict("loss_trend", RED, f"{after} {way}: it does not fall", place)
    scale = (
        ""
        if drop >= t.loss_drop_to_scale
        else (f", less than the {_percent(t.loss_drop_to_scale)} that make scaling up safe")
    )
    detail = f"the loss fell by {_percent(max(drop, fall))} in {t.loss_steps} steps{scale}"
    return Verdict("loss_trend", GREEN, detail, place)


def _fell_later(first: Attempt) -> bool:
    """Whether the median of some later window is well below the losses at the start."""
    start, best = [loss for _, loss in first.early[:20]], first.losses.best
    if best is None or len(start) < 5:
        return False
    middle = median(start)
    noise = median([abs(loss - middle) for loss in start])
    return middle - best > max(_FLAT * abs(middle), noise)


_FEW = 5  # losses in a row that are no accident


def _loss_rise(attempt: Attempt, t: Thresholds) -> Verdict:
    losses, first = attempt.losses, attempt.first
    if attempt.objective == "policy":
        return Verdict("loss_rise", NOT_OBSERVED, "a policy's loss, which may rise")
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
    if big.bad_in_a_row == 1 and big.worst_row < t.in_a_row and big.seen > 1:
        explosive = ""  # a spike in the last line may come back, as others do
    if explosive:
        return Verdict(
            "gradients",
            RED,
            f"gradient norm up to {big.highest:.3g}, above {t.grad_norm_max:g} {explosive}",
            big.worst_row_start[0] if big.worst_row_start else None,
        )
    vanished = _row(zero, _no_accident(attempt))
    if vanished and (attempt.objective != "policy" or zero.worst_row >= _NO_SIGNAL):
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
    if attempt.objective == "policy":
        why = "a policy's rate follows the length of its answers"
        return Verdict("throughput", NOT_OBSERVED, why)
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
