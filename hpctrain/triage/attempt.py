"""What is kept of one attempt: from a job's start (or requeue) to its end. Fixed size, however long
the log."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from dataclasses import dataclass, field

from hpctrain.triage.failures import FAILURES
from hpctrain.triage.records import Event, Place, Step, Window, median
from hpctrain.triage.thresholds import Thresholds

_MOST_EVENTS = 24  # kept of each class; the first are the ones that matter
_TREND_LINES = 400
_SURVIVED_S, _SURVIVED_STEPS = 60.0, 500
_MOST_SHAPES = 512  # messages that are told apart
_LOOK_FOR_OBJECTIVE = 20  # step lines
_PEER = re.compile(
    r"\b(?:peer|remote peer|connect(?:ion)? to|recv from|closed by(?: remote peer)?) "
    r"\[?(\d+\.\d+\.\d+\.\d+|[a-z][a-z-]*\d[\w.-]*)"
)
_EPOCH = re.compile(rb"(?i)epoch['\"]?\s*[:= \[]+\s*(\d{1,5}(?:\.\d+)?)\b")
_PREFERENCE = re.compile(rb"margin|logps?[_/](?:chosen|rejected)|rewards/chosen|\bdpo\b", re.I)
_POLICY = re.compile(
    rb"reward|pg_loss|policy[_ /]?loss|\bactor\b|act_loss|rollout|advantage|completions?/"
    rb"|grpo|\bppo\b"
    rb"|approx_kl|pg_clip|zero_std|clip_?(?:frac|ratio)",
    re.I,
)


@dataclass
class Series:
    """The figures of one kind that a rule needs: counts, extremes, first offender, recent
    values."""

    seen: int = 0
    highest: float = -math.inf
    bad: int = 0
    bad_in_a_row: int = 0
    first_bad: tuple[Place, float] | None = None
    worst_row: int = 0
    row_start: tuple[Place, float] | None = None
    worst_row_start: tuple[Place, float] | None = None

    def add(self, value: float, place: Place, bad: bool) -> None:
        self.seen += 1
        if value > self.highest:
            self.highest = value
        if not bad:
            self.bad_in_a_row = 0
            return
        self.bad += 1
        self.first_bad = self.first_bad or (place, value)
        if self.bad_in_a_row == 0:
            self.row_start = (place, value)
        self.bad_in_a_row += 1
        if self.bad_in_a_row > self.worst_row:
            self.worst_row, self.worst_row_start = self.bad_in_a_row, self.row_start


@dataclass
class Attempt:
    """One start of the job in one log file. Times are UTC seconds since 1970, None where the log
    tells none."""

    file: str
    thresholds: Thresholds
    job_id: str | None = None
    restart: int = 0
    link: int | None = None
    mode: str | None = None
    nodes: list[str] = field(default_factory=list)
    first_line: int = 1
    first_told: bool = False  # whether the job script's own first line began it
    exit_code: int | None = None
    finished: str | None = None  # why the program says it is done
    framework: str | None = None
    objective: str | None = None  # `policy` or `preference` where the figures tell it
    resumed: str | None = None  # the words by which the program says that it goes on from one

    num_steps: int = 0
    first: Step | None = None
    second: Step | None = None
    last: Step | None = None
    last_place: Place | None = None
    first_step_time_s: float | None = None
    last_step_time_s: float | None = None
    last_time_s: float | None = None  # the latest time that any line told
    total: int | None = None
    quiet_phase: str | None = None
    first_failed: tuple[int, str] | None = None  # rank and node, by the job script's own account
    # what the guard found and mended before the step
    guard_notes: list[str] = field(default_factory=list)
    locked_out: bool = False  # ended at once, because another job works on the same checkpoints
    slurm_state: str | None = None  # how Slurm says that this start ended
    slurm_signal: int | None = None  # and by which signal its job script was ended

    _early_full: bool = False
    early: list[tuple[int, float]] = field(default_factory=list)  # (steps since the first, loss)
    loss: Series = field(default_factory=Series)
    zero_loss: Series = field(default_factory=Series)
    grad_big: Series = field(default_factory=Series)
    grad_zero: Series = field(default_factory=Series)
    grad_bad: Series = field(default_factory=Series)
    losses: Window = field(default_factory=lambda: Window(20, min))
    norms: Window = field(default_factory=lambda: Window(20, min))
    rates: Window = field(default_factory=lambda: Window(20, max))
    rate_unit: str = ""
    step_times: Window = field(default_factory=lambda: Window(50, min))
    save_times: Window = field(default_factory=lambda: Window(50, min))
    skipped: int = 0
    skipped_at_minimum: int = 0  # while the loss scale could not be lowered any more
    skipped_first: Place | None = None
    nan_iterations: int = 0
    nan_first: Place | None = None
    counts_skipped: bool = False
    _last_skipped: int = 0
    _began_anew: int = 0  # how many step lines there were when the iterations last went back

    events: dict[str, list[Event]] = field(default_factory=dict)
    event_counts: dict[str, int] = field(default_factory=dict)
    # by a message without what differs from time to time: its first event
    shapes: dict[str, Event] = field(default_factory=dict)
    peers: dict[str, set[str]] = field(default_factory=dict)  # by a blamed peer: who blames it

    def replace_event(self, old: Event, new: Event) -> None:
        """The same line told something more specific."""
        kept = self.events.get(old.failure, [])
        if old in kept:
            kept.remove(old)
        self.event_counts[old.failure] -= 1
        self.add_event(new)

    def add_event(self, event: Event) -> None:
        self.event_counts[event.failure] = self.event_counts.get(event.failure, 0) + 1
        if len(self.shapes) < _MOST_SHAPES:
            self.shapes.setdefault(shape_of(event.text), event)
        if event.failure == "communication" and (peer := _PEER.search(event.text)):
            self._blame(peer[1], event)
        kept = self.events.setdefault(event.failure, [])
        # The first of a class, and the first after each step: an old one that training survived
        # must not hide a new one.
        if len(kept) >= _MOST_EVENTS and kept[-1].steps_before < event.steps_before:
            kept.pop(0)
        if len(kept) < _MOST_EVENTS:
            kept.append(event)

    def with_files(self, others: list[Attempt]) -> Attempt:
        """This attempt with what other files of the same start tell: what ended them may be its
        cause, and what their own training survived is not."""
        out = copy.copy(self)
        out.events = {name: list(kept) for name, kept in self.events.items()}
        out.event_counts, out.shapes = dict(self.event_counts), dict(self.shapes)
        out.peers = {peer: set(who) for peer, who in self.peers.items()}
        for other in others:
            out.finished = out.finished or other.finished
            out.resumed = out.resumed or other.resumed
            out.last_time_s = max(
                (time_s for time_s in (out.last_time_s, other.last_time_s) if time_s is not None),
                default=None,
            )
            for event in (event for kept in other.events.values() for event in kept):
                if not other.survived(event):
                    out.add_event(dataclasses.replace(event, steps_before=self.num_steps))
        return out

    def _blame(self, peer: str, event: Event) -> None:
        who = event.node or (f"rank {event.rank}" if event.rank is not None else "")
        if who and who != peer and (peer in self.peers or len(self.peers) < _MOST_EVENTS):
            self.peers.setdefault(peer, set()).add(who)

    @property
    def blamed_peer(self) -> str | None:
        """The one peer that at least two others name, and more of them than name any other."""
        ranked = sorted(((len(who), peer) for peer, who in self.peers.items()), reverse=True)
        if not ranked or ranked[0][0] < 2 or (len(ranked) > 1 and ranked[1][0] == ranked[0][0]):
            return None
        return ranked[0][1]

    def add_step(self, step: Step, place: Place, position: tuple[int, int] | None) -> Step:
        """Take in one step line; `position` is a progress bar's (step, total) for lines that do not
        say theirs."""
        if step.iteration is None and position:
            step = step._replace(iteration=position[0], total=position[1])
        if step.framework == "deepspeed" and self.framework not in (None, "deepspeed"):
            self._count_skipped(step, place)  # the framework's own line tells the rest
            return step
        if step.framework == "any" and self.framework not in (None, "any", "deepspeed"):
            return step
        self.framework = step.framework
        if self._goes_on(step):
            self._add_loss(step, place)
            return step
        self.num_steps += 1
        self.quiet_phase = None
        if self.num_steps == 2:
            self.second = step
        self.first = self.first or step
        if self.last and (step.iteration or 0) < (self.last.iteration or 0):
            self._began_anew = self.num_steps
        self.last, self.last_place = step, place
        self.total = step.total or self.total
        self._add_loss(step, place)
        self._add_norm(step, place)
        self._add_rate(step)
        self._count_skipped(step, place)
        return step

    def _goes_on(self, step: Step) -> bool:
        """Whether this is the loss of the step that the last line only named."""
        last = self.last
        if last is None or last.loss is not None or step.iteration is None or step.loss is None:
            return False
        if step.framework != "any" or last.iteration != step.iteration:
            return False
        self.last = step
        if self.first is last:
            self.first = step
        return True

    def see_objective(self, line: bytes) -> None:
        """Learn from the figures of a step line, or from one that names them, what is optimised."""
        if not self.num_steps and (epoch := _EPOCH.search(line)) and float(epoch[1]) >= 2:
            self.resumed = self.resumed or f"epoch {epoch[1].decode()} at its first step"
        if self.objective is None and self.num_steps <= _LOOK_FOR_OBJECTIVE:
            if _PREFERENCE.search(line):
                self.objective = "preference"
            elif _POLICY.search(line):
                self.objective = "policy"

    @property
    def goes_on_from(self) -> str | None:
        """Why this start is none from the beginning; None where nothing says so."""
        if self.mode == "resume":
            return "the logs begin with a resume"
        if self.mode:
            return None
        first, second = self.first, self.second
        for what in ("iteration", "epoch"):
            begun, then = (getattr(step, what, None) or 0.0 for step in (first, second))
            if then > begun > 2 * (then - begun) + (what == "iteration"):
                return f"the first step line is of {what} {begun}"
        return f"it says: {self.resumed}" if self.resumed else None

    def _since_first(self, step: Step) -> int:
        if step.iteration is not None and self.first and self.first.iteration is not None:
            return step.iteration - self.first.iteration
        return self.num_steps - 1

    def _add_loss(self, step: Step, place: Place) -> None:
        if step.loss is None:
            return
        finite = math.isfinite(step.loss)
        self.loss.add(step.loss if finite else -math.inf, place, not finite)
        # The loss of a policy gradient may be exactly 0; with a gradient that is not, it is no lost
        # label.
        moves = step.grad_norm is not None and math.isfinite(step.grad_norm) and step.grad_norm > 0
        self.zero_loss.add(step.loss, place, step.loss == 0.0 and not moves)
        if not finite:
            return
        self.losses.add(step.loss, step.iteration)
        if not self._early_full:
            since = self._since_first(step)
            late = since > 1.5 * self.thresholds.loss_steps
            if not late or not self.early or self.early[-1][0] < self.thresholds.loss_steps:
                self.early.append((since, step.loss))
            self._early_full = late or len(self.early) >= _TREND_LINES

    def _add_norm(self, step: Step, place: Place) -> None:
        norm = step.grad_norm
        if norm is None:
            return
        finite = math.isfinite(norm)
        self.grad_bad.add(norm if finite else math.inf, place, not finite)
        if not finite:
            return
        self.grad_big.add(norm, place, norm > self.thresholds.grad_norm_max)
        self.grad_zero.add(norm, place, norm == 0.0)
        self.norms.add(norm, step.iteration)

    def _add_rate(self, step: Step) -> None:
        if step.step_time_s:
            self.step_times.add(step.step_time_s)
        if step.tokens_per_s is not None:
            unit, rate = "tokens/s", step.tokens_per_s
        elif step.samples_per_s is not None:
            unit, rate = "samples/s", step.samples_per_s
        elif step.step_time_s:
            unit, rate = "steps/s", 1 / step.step_time_s
        else:
            return
        if self.rate_unit in ("", unit) and math.isfinite(rate):
            self.rate_unit = unit
            self.rates.add(rate, step.iteration)

    def _count_skipped(self, step: Step, place: Place) -> None:
        if step.skipped == 0 and not step.nan:
            self.counts_skipped = True
            return
        in_grace = self._since_first(step) < self.thresholds.skipped_grace
        if step.skipped is not None:
            self.counts_skipped = True
            new = step.skipped
            if step.cumulative:
                new = max(step.skipped - self._last_skipped, 0)
                self._last_skipped = step.skipped
            if new and not in_grace:
                self.skipped += new
                self.skipped_first = self.skipped_first or place
        if step.nan:
            self.nan_iterations += step.nan
            self.nan_first = self.nan_first or place

    def survived(self, event: Event) -> bool:
        """Whether training went on after the event, or after the same message before: what did not
        end the run once does not explain its end.
        """
        before = self.shapes.get(shape_of(event.text))
        if before is not None and before.order < event.order and self._went_on_after(before):
            return not FAILURES[event.failure].external
        return self._went_on_after(event)

    def _went_on_after(self, event: Event) -> bool:
        """Whether there were more step lines, and for longer than Slurm takes to end a broken step.

        Ranks without collectives write on until `srun --wait` ends them, so a few quick lines prove
        nothing.
        """
        after = self.num_steps - event.steps_before
        if after < 3:
            return False
        by_slurm = FAILURES[event.failure].external and not event.text.startswith("hpctrain: ")
        if by_slurm and after < _SURVIVED_STEPS:
            # Slurm has ended it: unless a start began anew, that are the last lines of its tasks,
            # which came a little later.
            return self._began_anew > event.steps_before
        step_s = median(self.step_times.last()) if self.step_times.values else None
        return step_s is None or after * step_s >= _SURVIVED_S or after >= _SURVIVED_STEPS

    @property
    def iterations_seen(self) -> int:
        """From the first step line's iteration to the last one's; 0 where they tell none."""
        first, last = self.first, self.last
        if first is None or last is None or first.iteration is None or last.iteration is None:
            return 0
        return max(last.iteration - first.iteration + 1, 0)

    @property
    def reached_end(self) -> bool:
        """Whether the step says it did all it was asked to do."""
        if self.finished:
            return True
        last = self.last
        return bool(
            last and last.iteration is not None and self.total and last.iteration >= self.total
        )


_DIFFERS = re.compile(
    r"0x[0-9a-fA-F]+|(?:/[\w.@+-]+){2,}/?|\d+(?:\.\d+)*|'[^']{0,80}'|\"[^\"]{0,80}\""
)


def shape_of(text: str) -> str:
    """A message without its numbers, paths and quoted words: the same for each of its
    occurrences."""
    return _DIFFERS.sub("#", text)
