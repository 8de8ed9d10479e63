"""What triage reads out of logs: step lines, events, and where they were."""

from __future__ import annotations

import math
import re
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Step(NamedTuple):
    """One progress line of a training framework; what it does not say is None. Times in seconds,
    rates over all ranks.

    `skipped` and `nan` are the framework's counts of iterations without an update. `cumulative`:
    whether they count since the start of the job rather than since the last line.
    """

    framework: str
    iteration: int | None = None
    total: int | None = None
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    step_time_s: float | None = None
    tokens_per_s: float | None = None
    samples_per_s: float | None = None
    skipped: int | None = None
    nan: int | None = None
    cumulative: bool = False
    epoch: float | None = None


@dataclass(frozen=True)
class Place:
    """A line of a log; `number` counts from 1 as editors do."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"


@dataclass(frozen=True)
class Event:
    """A line that names a failure. `time_s` is UTC seconds since 1970 where a time of the line is
    known.

    `offset` is the line's first byte in the file, where it is known. `weak`: said by a shell or a
    helper program in passing; any exception outranks it.
    """

    failure: str
    place: Place
    text: str
    rank: int | None = None
    node: str | None = None
    time_s: float | None = None
    steps_before: int = 0
    order: int = 0
    weak: bool = False
    offset: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "failure": self.failure,
            "file": self.place.file,
            "line": self.place.number,
            "text": self.text,
            "rank": self.rank,
            "node": self.node,
            "time": utc(self.time_s),
        }


@dataclass
class Window:
    """The last few values, the medians of whole windows, and the best of those: enough for a trend
    in fixed memory."""

    size: int
    better: Any = max
    values: list[float] = field(default_factory=list)
    best: float | None = None
    best_at: int | None = None
    seen: int = 0

    def add(self, value: float, at: int | None = None) -> None:
        self.seen += 1
        self.values.append(value)
        if self.seen % self.size == 0 and len(self.values) >= self.size:
            middle = median(self.values[-self.size :])
            if self.best is None or self.better(middle, self.best) == middle != self.best:
                self.best, self.best_at = middle, at
        if len(self.values) >= 2 * self.size:
            del self.values[: self.size]

    def last(self) -> list[float]:
        return self.values[-self.size :]


def median(values: list[float]) -> float:
    """The middle value; NaN for none."""
    ordered = sorted(values)
    count = len(ordered)
    if not count:
        return math.nan
    return ordered[count // 2] if count % 2 else (ordered[count // 2 - 1] + ordered[count // 2]) / 2


def last_match(
    pattern: re.Pattern[bytes], text: bytes, start: int = 0, end: int = sys.maxsize
) -> re.Match[bytes] | None:
    """The last place in `text[start:end]` where the pattern matches."""
    return next(iter(deque(pattern.finditer(text, start, end), maxlen=1)), None)


_LOG_JOB = re.compile(
    r"-(\d+)(?P<array>_\d+)?\.(?:out|err|log)\Z"
    r"|[-_.](?!20\d{6}\b)(\d{5,})(?P<of>_\d+)?[-_.](?:\d{1,4}|(?:rank|task|node)[-_]?\w+)"
    r"\.(?:out|err|log)\Z"
)
# What differs between the files of one start: the stream, and which rank, task or node wrote it.
_STREAM = re.compile(r"(?:[._-]?(?:stdout|stderr))?\.(?:out|err|log|txt)\Z|/(?:stdout|stderr)\Z")
_WRITER = re.compile(r"(?i)((?:rank|task|node|worker|proc)[-_.]?)\d+|(?<=/)\d+(?=/?\Z)")


def job_of_log(path: str) -> str | None:
    """The id of the job whose log this is, by the file's name: `<run>-<job>.out`,
    `slurm-<job>_<task>.out`, `<run>-<job>-<task>.err`."""
    found = _LOG_JOB.search(path)
    return found[3] or found[1] if found else None


def start_of_log(path: str) -> str:
    """The same text for all files of one start: its two streams, and one file for each rank, task
    or node (`srun -o %j-%t.out`, torchrun's `--log-dir`)."""
    found = _LOG_JOB.search(path)
    if found:
        group = 3 if found[3] else 1
        return path[: found.end(group)] + (found["array"] or found["of"] or "")
    return _WRITER.sub(r"\1", _STREAM.sub("", path))


def utc(time_s: float | None) -> str | None:
    """`2026-11-21T01:52:08Z`, or None for a time that is not known or not representable."""
    import datetime

    if time_s is None:
        return None
    try:
        return datetime.datetime.fromtimestamp(time_s, datetime.timezone.utc).strftime(
            "%Y-%m-%dT%H:%M:%SZ"
        )
    except (ValueError, OverflowError, OSError):
        return None


def distinct(notes: Iterable[str]) -> list[str]:
    """The guard's notes without those that only repeat of a checkpoint what the note about `latest`
    says of it."""
    said = list(dict.fromkeys(note for note in notes if note))
    return [
        note
        for note in said
        if not any(
            note.replace(" is not", ", which is not", 1).split("; it is now")[0] in other
            for other in said
            if other != note
        )
    ]
