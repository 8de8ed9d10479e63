"""Reads logs piece by piece and keeps what the rules need. No files, no clock: whoever feeds it has
those."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Callable, Iterable

from hpctrain.base.units import expand_nodes
from hpctrain.triage import exceptions
from hpctrain.triage.attempt import Attempt
from hpctrain.triage.formats import (
    FAR,
    HEADER_ANCHORS,
    STEP_ANCHORS,
    Parser,
    header,
    loss_in,
    rewarded,
    tqdm_before,
)
from hpctrain.triage.normal import plain
from hpctrain.triage.patterns import BENIGN, PATTERNS, PRECEDENCE, Pattern
from hpctrain.triage.records import Event, Place, Step, job_of_log, last_match
from hpctrain.triage.scan import UNIFORM, Hit, LineScanner, Matcher
from hpctrain.triage.thresholds import Thresholds
from hpctrain.triage.uniform import skeleton, template_of

_JOB = re.compile(rb"hpctrain: job (\S+), restart (\d+), (\d+) nodes: (\S+)")
_STARTING = re.compile(rb"hpctrain: starting: (\w+), link (\d+)")
_FINISHED = re.compile(rb"hpctrain: finished rc=(\d+)")
_FIRST_FAILED = re.compile(rb"hpctrain: the first task to fail was rank (\d+) on ([\w.-]+)")
_DONE = re.compile(
    rb"hpctrain: ((?:done|stopped by)[^\n]*|link \d+: (?:nothing to do|stops, as asked)[^\n]*)"
)
_SAVED = re.compile(rb"hpctrain: saved .* in (\d+(?:\.\d+)?) s\b")
_LOCKED_OUT = b"two at once would corrupt its checkpoints"
# What the guard says before the step beside its decision: checkpoints found wanting, moved, or
# named anew.
_GUARD_NOTE = re.compile(
    rb"^hpctrain: (?!job |link \d|preflight:|starting:|error:)(?=.*(?:not complete|is empty|is"
    rb" missing|is not there|names no|named no"
    rb"|which was to name|on purpose|is newer than|left its lock behind))(.+)"
)
_MOST_NOTES = 8
_TIME = re.compile(rb"(?<!\d)(20\d\d)-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)")
_SLURM_CANCELLED = re.compile(rb"CANCELLED AT (\S+)")
_QUIET = (
    b"Caching reference logprobs",
    b"Tokenizing ",
    b"Building data index",
    b"precompute_ref_log_probs",
    b"Precomputing reference",
)
# How programs say that they go on from a checkpoint, in the words before their first step.
_RESUMED = re.compile(
    rb"(?i)\b(?:resum|restor|continu)\w* [^\n]{0,80}\b"
    rb"(?:checkpoint|ckpt|step|epoch|iteration|run)\b"
    rb"|resum(?:ing|ed) from|loaded checkpoint[^\n]* (?:iteration|step) [1-9]"
    rb"|starts? at step (?!1\b)[1-9]|loading the checkpoint from"
)
_RESUMED_ANCHORS = (
    b"esuming ",
    b"esumed ",
    b"estoring ",
    b"estored ",
    b"ontinuing ",
    b"oaded checkpoint",
    b" at step ",
    b"Loading the checkpoint",
)
_RANK = re.compile(
    rb"\[(?:rank|default)\s?(\d+)\]|\[Rank (\d+)\]|\brank[ =:](\d+)\b|\btask"
    rb" (\d+)(?::|\b)|^\s*(\d+): ",
    re.IGNORECASE,
)
_NODE = re.compile(
    rb"hpctrain: preflight: (\S+) is bad: |srun: error: ([A-Za-z][\w.-]*\d[\w.-]*): |\bON"
    rb" ([A-Za-z][\w.-]*) (?:CANCELLED|FAILED)|fail(?:ed|ure) on node"
    rb" ([A-Za-z][\w.-]*)|\[([a-z][a-z-]*\d[\w.-]*)\] - Abort|[Nn]ode failure on ([\w.-]+)"
    rb"|\b([A-Za-z][\w-]*\d[\w.-]*):\d+:\d+ \[\d+\] (?:\S+"
    rb" )?NCCL|\bhost\s*[:=]\s*([A-Za-z][\w.-]*)|[Nn]ode ([A-Za-z][\w.-]*\d) is DOWN|(?:\(IP|IP"
    rb" address|and address): \[?(\d+\.\d+\.\d+\.\d+)"
    rb"|\bip=(\d+\.\d+\.\d+\.\d+)|on node ([A-Za-z][\w.-]*) exited"
    rb"|^(?:slurmstepd-)?(?!rank|task|epoch|step|worker|default"
    rb"|slurmstepd|srun)([a-z][a-z-]*\d[a-z\d.-]*): "
)
_ELASTIC_RANK = re.compile(rb"rank +: (\d+)")
_ELASTIC_HOST = re.compile(rb"host +: ([\w.-]+)")
# Ray tells where a call or an actor was on a line of its own, before or after the one that tells
# what failed.
_RAY_CALL = re.compile(
    rb"ray::\S+\(\) \(pid=\d+, ip=(\d+\.\d+\.\d+\.\d+)|^\s+ip: \[?(\d+\.\d+\.\d+\.\d+)",
    re.MULTILINE,
)
_RAY_ACTOR = re.compile(rb"^\s+ip: \[?(\d+\.\d+\.\d+\.\d+)", re.MULTILINE)
_SCALE = re.compile(rb"Attempted loss scale: ([\d.]+), reducing to ([\d.]+)")
_TEXT = 400
_NEAR_LINES = 10
_MOST_TOLD = (
    256  # lines of which it is remembered what they told; the ends of open tracebacks among them
)
_OFTEN = 24  # times that a message is kept, while steps follow it
_LONGEST = 4096  # bytes of a step line that may become a template
_DENSE = 1000  # step lines of an attempt that are all read before healthy ones are sampled


class _Anchors:
    """All anchors with what each means, and the matcher over them; made once."""

    def __init__(self) -> None:
        entries: list[tuple[bytes, str, object]] = [
            (anchor, "step", parser) for anchor, parser in STEP_ANCHORS
        ]
        entries += [(pattern.anchor, "failure", pattern) for pattern in PATTERNS]
        entries += [(b"hpctrain: ", "ours", None), (b"'train_runtime':", "hf_done", None)]
        entries += [(phrase, "quiet", phrase) for phrase in _QUIET]
        entries += [(anchor, "header", None) for anchor in HEADER_ANCHORS]
        entries += [(anchor, "resumed", None) for anchor in _RESUMED_ANCHORS]
        entries += [
            (b"eward", "objective", None),
            (b"Local host: ", "host", None),
            (b"OVERFLOW! ", "overflow", None),
            (exceptions.HEADER, "traceback", None),
        ]
        by_anchor: dict[bytes, list[tuple[str, object]]] = {}
        for anchor, kind, what in entries:
            by_anchor.setdefault(anchor, []).append((kind, what))
        self.meanings = list(by_anchor.values())
        self.matcher = Matcher(list(by_anchor))


_anchors: _Anchors | None = None


def _get_anchors() -> _Anchors:
    global _anchors
    _anchors = _anchors or _Anchors()
    return _anchors


class Engine:
    """The state of a triage over any number of logs. `tasks_per_node` turns ranks into nodes;
    `on_step` sees every step.

    Feed files with `log(name)`, which gives a `LogReader`; ask `judge.judge(engine)` at any time.
    """

    def __init__(
        self,
        thresholds: Thresholds | None = None,
        tasks_per_node: int | None = None,
        on_step: Callable[[Attempt, Step, Place, float | None], None] | None = None,
    ):
        self.thresholds = thresholds or Thresholds()
        self.tasks_per_node = tasks_per_node
        self.on_step = on_step
        self.attempts: list[Attempt] = []
        self.logs: dict[str, LogReader] = {}
        self.order = 0

    def log(self, name: str) -> LogReader:
        """The reader of the log called `name`; the same one each time."""
        if name not in self.logs:
            self.logs[name] = LogReader(self, name)
        return self.logs[name]


class LogReader:
    """One log being read. `modified_s`, when the feeder knows it, is when the file last grew."""

    def __init__(self, engine: Engine, name: str):
        anchors = _get_anchors()
        self.engine, self.name = engine, name
        self.modified_s: float | None = None
        self._meanings = anchors.meanings
        self._scanner = LineScanner(anchors.matcher, exceptions.is_open)
        self._handlers: dict[str, Callable[[Hit, object], None]] = {
            "failure": self._failure,
            "traceback": self._traceback,
            "ours": self._our_line,
            "header": self._name_step,
            "objective": self._see_reward,
            "resumed": self._resumed,
            "hf_done": self._trainer_is_done,
            "host": self._name_host,
            "quiet": self._quiet_phase,
            "overflow": self._overflow,
        }
        self._attempt: Attempt | None = None
        self._tail = b""
        self._ends: exceptions.LastLines | None = None
        self._no_step: tuple[int, Parser] | None = None  # the line, and by whose word it is none
        self._header: tuple[int, int | None, int] | None = None  # a step, of how many, its line
        self._ignored: set[int] = set()  # lines by which Python ends what it ignored
        self._like_a_step = b""  # the last line that looked like one
        # by a line's offset: what it told, and whether its own words did
        self._told: dict[int, tuple[Event, bool]] = {}
        self._often: dict[bytes, tuple[int, int]] = {}  # how often a message, since which step
        self._classified = -1  # the line that ends the last traceback
        self._unlike = 0  # step lines in a row that are not of the template

    @property
    def num_bytes(self) -> int:
        return self._scanner.num_bytes

    @property
    def num_lines(self) -> int:
        return self._scanner.num_lines

    @property
    def binary(self) -> bool:
        """Whether more than one byte in a hundred is NUL: not a log, or one that a crash tore."""
        return self._scanner.num_nul * 100 > self._scanner.num_bytes

    @property
    def like_a_step(self) -> str:
        """The last line that looked like a step's and told none that is known."""
        return clean(self._like_a_step)

    @property
    def last_words(self) -> str:
        """The last line that is not blank."""
        lines = [line for line in re.split(rb"[\r\n]", self._tail) if line.strip()]
        return clean(lines[-1]) if lines else ""

    def feed(self, piece: bytes, now_s: float | None = None) -> None:
        """Read on. `now_s`: when this was written, in follow mode; None for what was there
        before."""
        self._tail = (self._tail + piece[-2 * _TEXT :])[-2 * _TEXT :]
        self._take(self._scanner.feed(piece), now_s)

    def close(self) -> None:
        """The log has ended: judge its last, unfinished line too."""
        self._take(self._scanner.close(), None)

    def _take(self, hits: Iterable[Hit], now_s: float | None) -> None:
        last_step: Hit | None = None
        for hit in hits:
            if self._scanner.quiet_steps:
                self._current(hit).num_steps += self._scanner.quiet_steps
                self._scanner.quiet_steps = 0
            if hit.anchor == UNIFORM:
                self._stretch(hit, now_s)
                last_step = hit
                continue
            for kind, what in self._meanings[hit.anchor]:
                if kind != "step":
                    self._handlers[kind](hit, what)
                elif self._step(hit, what, now_s):  # type: ignore[arg-type]
                    last_step = hit
                    break
        if last_step is not None and self._attempt is not None and now_s is None:
            # Steps of one piece are close together, so one look around the last one tells the time
            # of all.
            time_s = _time_near(last_step.context, last_step.position)
            if time_s is not None:
                self._attempt.last_step_time_s = time_s
                self._attempt.first_step_time_s = self._attempt.first_step_time_s or time_s

    def _current(self, hit: Hit) -> Attempt:
        if self._attempt is None:
            self._attempt = Attempt(
                self.name,
                self.engine.thresholds,
                job_id=job_of_log(self.name),
                first_line=hit.number,
            )
            self.engine.attempts.append(self._attempt)
        return self._attempt

    def _step(self, hit: Hit, parse: Parser, now_s: float | None) -> bool:
        if self._no_step == (hit.offset, parse):
            return False
        step = parse(hit.line)
        if step is None and self._header is not None:
            step = self._below_header(hit)
        if step is None:
            self._no_step = (hit.offset, parse)
            self._like_a_step = hit.line[: 4 * _TEXT]
            return False
        self._scanner.skip_line()  # its other anchors say nothing new
        attempt = self._current(hit)
        position = None
        if step.iteration is None:
            position = tqdm_before(hit.context, hit.position)
        place = Place(self.name, hit.number)
        counted = attempt.num_steps
        attempt.see_objective(hit.line)
        step = attempt.add_step(step, place, position)
        if attempt.num_steps == counted:
            return False  # a second kind of line about the same steps
        if now_s is not None:
            attempt.last_step_time_s = now_s
            attempt.first_step_time_s = attempt.first_step_time_s or now_s
        if attempt.num_steps > _DENSE and not self.engine.on_step:
            self._learn(hit, parse)
        if self.engine.on_step:
            self.engine.on_step(attempt, step, place, _time_in(hit.line) or now_s)
        return True

    def _below_header(self, hit: Hit) -> Step | None:
        """The step whose loss this line tells, where a line above told which step it is."""
        assert self._header is not None
        iteration, total, number = self._header
        loss = loss_in(hit.line) if hit.number - number <= FAR else None
        if loss is None:
            return None
        self._header = None
        return Step("any", iteration, total, loss)

    def _name_step(self, hit: Hit, what: object) -> None:
        """A line that only heads a step's figures is progress; its loss may stand below."""
        place = header(hit.line)
        if place is None:
            return
        self._header = (*place, hit.number)
        attempt = self._current(hit)
        if attempt.framework in (None, "any"):
            attempt.add_step(Step("any", *place), Place(self.name, hit.number), None)

    def _see_reward(self, hit: Hit, what: object) -> None:
        """A line about rewards tells what is optimised; with a step in it, it is a step's of a
        process that knows no loss, as those that only collect answers."""
        step = rewarded(hit.line)
        if step is None and self._attempt is None:
            return
        attempt = self._current(hit)
        if step is not None and (attempt.last is None or attempt.last.loss is None):
            attempt.add_step(step, Place(self.name, hit.number), None)
            self._scanner.skip_line()
        attempt.see_objective(hit.line)

    def _stretch(self, hit: Hit, now_s: float | None) -> None:
        """Count the lines that the hit stands for, and read the last of them."""
        template, attempt = self._scanner.template, self._current(hit)
        assert template
        attempt.num_steps += self._scanner.uniform_steps - 1
        self._step(hit, template.parse, now_s)

    def _learn(self, hit: Hit, parse: Parser) -> None:
        """From here on look at one line only of a stretch of healthy ones such as this."""
        known = self._scanner.template
        self._unlike += 1
        if known is not None and skeleton(hit.line) == known.skeleton:
            self._unlike = 0
        elif len(hit.line) < _LONGEST and self._unlike & (self._unlike - 1) == 0:
            # ever more seldom, where no two are alike
            self._scanner.template = template_of(hit.line, parse, hit.anchor) or known

    def _failure(self, hit: Hit, pattern: object) -> None:
        assert isinstance(pattern, Pattern)
        line = hit.line
        if hit.offset in self._ignored:
            return
        known, by_words = self._told.get(hit.offset, (None, False))
        if (
            known is not None
            and by_words
            and PRECEDENCE[known.failure] <= PRECEDENCE[pattern.failure]
        ):
            return
        if not pattern.matches(line):
            return
        failure, strong = pattern.failure, True
        if failure == "program":
            if hit.offset == self._classified and (known is None or not known.weak):
                return  # as the end of its traceback it was classified already
            failure, strong = exceptions.classify(line)
            plainer = known is not None and known.weak and pattern.confirm is not exceptions.RAISED
            if (
                known is not None
                and not (plainer and not pattern.weak)
                and (not strong or PRECEDENCE[known.failure] <= PRECEDENCE[failure])
            ):
                return
        self._tell(hit, hit.offset, hit.number, line, failure, strong, pattern.weak)

    def _traceback(self, hit: Hit, what: object) -> None:
        """The exception at the end of the traceback that begins here."""
        if self._ends is None or self._ends.text is not hit.context:
            self._ends = exceptions.LastLines(hit.context)
        found = self._ends.of(hit.position)
        if found is None:
            return
        start, end = found
        if exceptions.is_ignored(hit.context, hit.position):
            self._ignored = {*list(self._ignored)[-_MOST_TOLD:], hit.offset + start - hit.start}
            return
        line = hit.context[start:end].rstrip(b"\r")
        if self._passed_over(line, self._current(hit)):
            self._classified = hit.offset + start - hit.start
            return
        failure, strong = exceptions.classify(line, hit.context[hit.position : start])
        offset = self._classified = hit.offset + start - hit.start
        if offset not in self._told and not BENIGN.search(line):
            self._tell(
                hit,
                offset,
                hit.number + hit.context.count(b"\n", hit.position, start),
                line,
                failure,
                strong,
            )

    def _passed_over(self, line: bytes, attempt: Attempt) -> bool:
        """Whether the end of a traceback has stood there so often, while training went on, that one
        more tells nothing."""
        same = line.translate(None, b"0123456789")
        times, steps = self._often.get(same, (0, attempt.num_steps))
        if times or len(self._often) < _MOST_TOLD:
            self._often[same] = times + 1, steps
        return times >= _OFTEN and attempt.num_steps - steps >= _DENSE

    def _tell(
        self,
        hit: Hit,
        offset: int,
        number: int,
        line: bytes,
        failure: str,
        by_words: bool,
        weak: bool = False,
    ) -> None:
        """Keep that the line at `offset` tells a failure, in place of what it was thought to tell
        before."""
        attempt = self._current(hit)
        time_s = _time_in(line)
        if time_s is None:
            cancelled = _SLURM_CANCELLED.search(line)
            time_s = _time_in(cancelled[1]) if cancelled else None
        if time_s is not None:
            attempt.last_time_s = time_s
        rank, node = _rank_and_node(line)
        if b"DUE TO NODE FAILURE" in line and attempt.nodes != [node]:
            node = None  # who could write this lives
        if b"exitcode  :" in line:
            # torch elastic's report of the first failure names rank and host on the lines above.
            above = hit.context[max(hit.position - 300, 0) : hit.position]
            rank, node = _last_number(_ELASTIC_RANK, above), _last_name(_ELASTIC_HOST, above)
        if node is None and rank is None:
            node = _ray_node(line, hit.context, hit.start + offset - hit.offset)
        if node is None and rank is not None and attempt.nodes and self.engine.tasks_per_node:
            index = rank // self.engine.tasks_per_node
            node = attempt.nodes[index] if index < len(attempt.nodes) else None
        self.engine.order += 1
        event = Event(
            failure,
            Place(self.name, number),
            clean(line),
            rank,
            node,
            time_s,
            attempt.num_steps,
            self.engine.order,
            weak,
            None if self._scanner.moved else offset,
        )
        known = self._told.get(offset)
        if known is not None:
            attempt.replace_event(known[0], event)
        else:
            attempt.add_event(event)
        if len(self._told) >= _MOST_TOLD:
            del self._told[next(iter(self._told))]
        self._told[offset] = event, by_words

    def _resumed(self, hit: Hit, what: object) -> None:
        attempt = self._current(hit)
        if not attempt.num_steps and not attempt.resumed and _RESUMED.search(hit.line):
            attempt.resumed = clean(hit.line)

    def _trainer_is_done(self, hit: Hit, what: object) -> None:
        self._current(hit).finished = "the trainer printed its summary"

    def _quiet_phase(self, hit: Hit, what: object) -> None:
        assert isinstance(what, bytes)
        self._current(hit).quiet_phase = what.decode().strip()

    def _overflow(self, hit: Hit, what: object) -> None:
        attempt = self._current(hit)
        attempt.counts_skipped = True
        scale = _SCALE.search(hit.line)
        late = attempt.num_steps >= self.engine.thresholds.skipped_grace
        if scale and scale[1] == scale[2]:
            attempt.skipped_at_minimum += 1
        elif late and b"Skipping step" in hit.line:
            attempt.skipped += 1
        else:
            return
        attempt.skipped_first = attempt.skipped_first or Place(self.name, hit.number)

    def _name_host(self, hit: Hit, what: object) -> None:
        """Open MPI tells where it was a few lines below what failed."""
        host = re.search(rb"Local host: +([A-Za-z][\w.-]*)", hit.line)
        if not host or not self._told:
            return
        offset, (event, by_words) = list(self._told.items())[-1]
        if event.node is None and 0 < hit.number - event.place.number <= _NEAR_LINES:
            named = dataclasses.replace(event, node=host[1].decode())
            self._current(hit).replace_event(event, named)
            self._told[offset] = named, by_words

    def _our_line(self, hit: Hit, what: object) -> None:
        line = hit.line
        job = _JOB.search(line)
        if job:
            try:
                nodes = expand_nodes(job[4].decode("ascii"))
            except (ValueError, UnicodeDecodeError):
                nodes = []
            self._attempt = Attempt(
                self.name,
                self.engine.thresholds,
                job[1].decode("ascii", "replace"),
                int(job[2]),
                nodes=nodes,
                first_line=hit.number,
                first_told=True,
            )
            self.engine.attempts.append(self._attempt)
            self._scanner.template = None  # the first steps of every start are all read
            self._told.clear()
            self._often.clear()
            return
        attempt = self._current(hit)
        time_s = _time_in(line)
        attempt.last_time_s = time_s if time_s is not None else attempt.last_time_s
        starting, finished, done = (
            _STARTING.search(line),
            _FINISHED.search(line),
            _DONE.search(line),
        )
        first = _FIRST_FAILED.search(line)
        if starting:
            attempt.mode, attempt.link = starting[1].decode("ascii", "replace"), int(starting[2])
        elif finished:
            attempt.exit_code = int(finished[1])
        elif first:
            attempt.first_failed = int(first[1]), first[2].decode("ascii", "replace")
        elif saved := _SAVED.search(line):
            attempt.save_times.add(float(saved[1]))
        elif _LOCKED_OUT in line:
            attempt.locked_out = True
        elif (
            attempt.mode is None
            and len(attempt.guard_notes) < _MOST_NOTES
            and (note := _GUARD_NOTE.search(line))
        ):
            attempt.guard_notes.append(clean(note[1]))
        elif done:
            attempt.finished = clean(done[1])


def clean(line: bytes) -> str:
    """A line as it may be shown: printable, of bounded length, without escape sequences."""
    line = line[: 4 * _TEXT]
    text = (plain(line) if b"\x1b" in line else line).decode("utf-8", "replace").strip()
    if not text.isprintable():
        text = "".join(char if char.isprintable() else " " for char in text)
    return text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"


def _ray_node(line: bytes, context: bytes, at: int) -> str | None:
    """The address of the node that Ray names beside the failure whose line is at `at`; None in a
    log that is not Ray's."""
    if b"actor died unexpectedly" in line:
        after = _RAY_ACTOR.search(context, at, at + 800)
        return after[1].decode() if after else None
    low = max(at - 2000, 0)
    if max(context.rfind(word, low, at) for word in (b"ray::", b"ip: ")) < 0:
        return None  # quickly: a log may have a hundred thousand failures
    before = last_match(_RAY_CALL, context, low, at)
    return (before[1] or before[2]).decode() if before else None


def _rank_and_node(line: bytes) -> tuple[int | None, str | None]:
    rank, node = _RANK.search(line), _NODE.search(line)
    found = next((group for group in rank.groups() if group), None) if rank else None
    name = next((group for group in node.groups() if group), None) if node else None
    return (int(found) if found and len(found) < 8 else None), (
        name.decode("ascii", "replace") if name else None
    )


def _last_number(pattern: re.Pattern[bytes], text: bytes) -> int | None:
    found = last_match(pattern, text)
    return int(found[1]) if found else None


def _last_name(pattern: re.Pattern[bytes], text: bytes) -> str | None:
    found = last_match(pattern, text)
    return found[1].decode("ascii", "replace") if found and found[1] != b"localhost" else None


def _time_in(text: bytes) -> float | None:
    found = _TIME.search(text)
    return _seconds(found) if found else None


def _time_near(text: bytes, position: int) -> float | None:
    """The last time told before `position`, or else the first soon after it."""
    found = last_match(_TIME, text, max(position - 1024, 0), position) or _TIME.search(
        text, position, position + 512
    )
    return _seconds(found) if found else None


def _seconds(found: re.Match[bytes]) -> float | None:
    # Logs write local or UTC time without saying which; only differences within one log are used
    # for verdicts.
    try:
        year, month, day, hour, minute, second = map(int, found.groups())
        return datetime.datetime(
            year, month, day, hour, minute, second, tzinfo=datetime.timezone.utc
        ).timestamp()
    except (ValueError, OverflowError):
        return None
