"""A run's logs as one: over links and requeues, with the first failing rank's lines first. Any
bytes, fixed memory."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from hpctrain.runs.records import RunRecords, list_logs
from hpctrain.runs.starts import links_of
from hpctrain.runtime.files import open_state
from hpctrain.triage.engine import clean
from hpctrain.triage.judge import Incident
from hpctrain.triage.records import Event, job_of_log

_CONTEXT_BEFORE, _CONTEXT_AFTER = 25, 5
_RANK = re.compile(rb"\[(?:rank|default)\s?(\d+)\]|\[Rank (\d+)\]|^\s*(\d+): ")
_MOST_BACK = 8 << 20  # bytes looked back for the last lines
_NEAR = 1 << 18  # bytes shown around a failure at most, above it


@dataclass(frozen=True)
class Section:
    """A heading and its lines, printable as they are."""

    heading: str
    lines: list[str]


def failing_lines(
    incident: Incident, before: int = _CONTEXT_BEFORE, after: int = _CONTEXT_AFTER
) -> Section:
    """The lines around the cause; where lines carry ranks, those of the failing rank (and those
    that carry none)."""
    event = incident.event
    kept: deque[tuple[int, str]] = deque(maxlen=before + 1)
    tail: list[tuple[int, str]] = []
    with open(event.place.file, "rb", opener=open_state) as file:
        for number, line in enumerate(_lines(file), _go_near(file, event)):
            if number > event.place.number + 20 * after or len(tail) >= after:
                break
            if event.rank is not None and number != event.place.number:
                found = _RANK.search(line)
                other = (
                    next((int(group) for group in found.groups() if group), None) if found else None
                )
                if other is not None and other != event.rank:
                    continue
            (kept if number <= event.place.number else tail).append((number, clean(line)))
    lines = [
        f"{'>' if number == event.place.number else ' '} {number}: {text}"
        for number, text in [*kept, *tail]
    ]
    where = ", ".join([str(event.place), *whose(incident)])
    return Section(f"first failure ({event.failure}): {where}", lines)


def whose(incident: Incident) -> list[str]:
    """The rank, node, link and job of a failure, as far as each is known."""
    event, attempt = incident.event, incident.attempt
    known = (
        ("rank", event.rank),
        ("node", event.node or None),
        ("link", attempt.link),
        ("job", attempt.job_id or None),
    )
    return [f"{what} {value}" for what, value in known if value is not None]


def _go_near(file: BinaryIO, event: Event) -> int:
    """Put `file` to the start of a line some way above the event's; returns that line's number.
    Never reads it line by line."""
    target = event.offset
    lines_before = event.place.number - 1
    if target is None or target > os.fstat(file.fileno()).st_size:
        target, lines_before = _line_start(file, event.place.number)
    low = max(target - _NEAR, 0)
    file.seek(low)
    above = file.read(target - low)
    cut = above.find(b"\n") + 1 if low else 0
    file.seek(low + cut)
    return lines_before + 1 - above.count(b"\n", cut)


def _line_start(file: BinaryIO, number: int) -> tuple[int, int]:
    """(offset, lines before) of a place at most one block above line `number`."""
    file.seek(0)
    offset = lines = 0
    while block := file.read(1 << 20):
        more = block.count(b"\n")
        if lines + more >= number - 1:
            break
        offset, lines = offset + len(block), lines + more
    return offset, lines


def _lines(file: object) -> Iterator[bytes]:
    """Lines of bounded length: junk without line ends comes in pieces of 64 KiB, counted as one
    line."""
    pending = b""
    while True:
        piece = file.readline(65536)  # type: ignore[attr-defined]
        if not piece:
            if pending:
                yield pending
            return
        pending = pending or piece
        if piece.endswith(b"\n"):
            yield pending
            pending = b""


def last_lines(path: str, count: int) -> list[str]:
    """The last `count` lines of a file, read from its end; carriage returns start their line anew,
    as on a terminal."""
    with open(path, "rb", opener=open_state) as file:
        size = os.fstat(file.fileno()).st_size
        read, text = 0, b""
        while read < min(size, _MOST_BACK) and text.count(b"\n") <= count:
            read = min(read + (1 << 18), size)
            file.seek(size - read)
            text = file.read(read)
    lines = text.split(b"\n")
    lines = lines[:-1] if lines and not lines[-1] else lines
    return [as_shown(line) for line in lines[-count:]] if count else []


def as_shown(line: bytes) -> str:
    """A line as a terminal would leave it: what follows the last carriage return, printable."""
    parts = [part for part in line.split(b"\r") if part.strip()]
    return clean_long(parts[-1] if parts else b"")


def clean_long(line: bytes) -> str:
    """Printable text of a line, without the length limit of `clean` that tables need."""
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", line[:65536]).decode("utf-8", "replace")
    return "".join(
        char if char.isprintable() or char == "\t" else "\ufffd" for char in text
    ).rstrip()


def sections(run: RunRecords, count: int, link: int | None = None) -> Iterator[Section]:
    """The end of each log, oldest job first; only link `link`'s where that is given."""
    links = links_of(run)
    for path in run.logs:
        job_id = job_of_log(path)
        number = links.get(job_id or "")
        if link is not None and number != link:
            continue
        title = f"link {number}, " if number is not None else ""
        try:
            yield Section(f"{title}job {job_id or '?'}: {path}", last_lines(path, count))
        except OSError as error:
            yield Section(
                f"{title}job {job_id or '?'}: {path} cannot be read: {error.strerror}", []
            )


def follow_run(
    run_dir: str, emit: Callable[[str], None], alive: Callable[[], bool], every_s: float = 1.0
) -> None:
    """Emit every new line of every log of the run, also of logs that appear, until `alive` says no
    job is left."""
    offsets: dict[str, int] = {path: os.path.getsize(path) for path in list_logs(run_dir)}
    pending: dict[str, bytes] = {}
    current = ""
    while True:
        going = alive()
        for path in list_logs(run_dir):
            for line in _new_lines(path, offsets, pending):
                if path != current:
                    emit(f"==> {path}")
                    current = path
                emit(line)
        if not going:
            return
        time.sleep(every_s)


def _new_lines(path: str, offsets: dict[str, int], pending: dict[str, bytes]) -> Iterator[str]:
    try:
        with open(path, "rb", opener=open_state) as file:
            size = os.fstat(file.fileno()).st_size
            start = offsets.get(path, 0)
            if size < start:
                start, pending[path] = 0, b""
            file.seek(start)
            while True:
                piece = file.read(1 << 20)
                if not piece:
                    break
                start += len(piece)
                *lines, rest = (pending.get(path, b"") + piece).split(b"\n")
                pending[path] = rest[-65536:]
                yield from map(as_shown, lines)
            offsets[path] = start
    except OSError:
        return
