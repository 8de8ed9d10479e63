"""All printing: data to stdout, everything else to stderr; meaning never by colour alone.

Colour follows `--color`, then a non-empty NO_COLOR, then CLICOLOR_FORCE, then whether the stream is
a terminal.
"""

from __future__ import annotations

import codecs
import io
import itertools
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from hpctrain.base.errors import Problem, printable

JSON_SCHEMA_VERSION = 1
_CODES = {
    "red": "31",
    "yellow": "33",
    "green": "32",
    "blue": "34",
    "cyan": "36",
    "bold": "1",
    "dim": "2",
}
_LEVEL_COLOUR = {"error": "red", "warning": "yellow", "note": "blue"}
_choice = "auto"


def make_printable() -> None:
    """Let stdout carry any text: a path's undecodable bytes as they are, what the locale's encoding
    lacks as an escape."""
    codecs.register_error("hpctrain", _as_bytes_or_escapes)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="hpctrain")


def _as_bytes_or_escapes(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    char = error.object[error.start]
    if "\udc80" <= char <= "\udcff":
        return bytes([ord(char) - 0xDC00]), error.start + 1
    return char.encode("ascii", "backslashreplace").decode("ascii"), error.start + 1


def set_color(choice: str) -> None:
    """Fix the colour policy for this process: `auto`, `always` or `never`."""
    global _choice
    _choice = choice


def wants_color(stream: IO[str]) -> bool:
    """Whether `stream` gets colour, see the module's first lines for the order of precedence."""
    if _choice != "auto":
        return _choice == "always"
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("CLICOLOR_FORCE", "0") not in ("", "0"):
        return True
    return stream.isatty()


def paint(text: str, style: str, stream: IO[str] | None = None) -> str:
    """`text` in a style (`red`, `bold`, …) where `stream` (default stdout) takes colour, else
    unchanged."""
    return f"\033[{_CODES[style]}m{text}\033[0m" if wants_color(stream or sys.stdout) else text


# What `paint` writes: the one thing that may speak to a terminal.
_PAINT = re.compile(r"(\x1b\[(?:[0-2]|3[1-46])m)")


def shown(text: str, keep: str = "\n\t") -> str:
    """`text` as a terminal gets it: nothing in it, whoever wrote it, moves the cursor, sets a title
    or turns the letters round; colours of ours stay."""
    if text.isprintable():
        return text
    parts = _PAINT.split(text)
    return "".join(part if _PAINT.match(part) else printable(part, keep) for part in parts)


def data(text: str) -> None:
    """One line (or block) of the answer, to stdout; to a pipe byte for byte."""
    sys.stdout.write((shown(text) if sys.stdout.isatty() else text) + "\n")


def data_json(**fields: Any) -> None:
    """The whole answer as one JSON object with `schema_version` first, to stdout."""
    import json  # not for `--help`

    answer = {"schema_version": JSON_SCHEMA_VERSION, **fields}
    text = json.dumps(answer, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
        plain = text.replace("\n", "").isprintable()
    except UnicodeEncodeError:
        plain = False
    if not plain:
        # half a surrogate pair, letters that the locale lacks, or what a terminal obeys: JSON has
        # escapes of its own
        text = json.dumps(answer, indent=2)
    sys.stdout.write(text + "\n")


def info(text: str) -> None:
    """A line for the person, not the pipe: to stderr."""
    print(shown(text), file=sys.stderr, flush=True)


def lines(found: Iterable[str], head: str = "") -> None:
    """Lines for the person, each once and with the same `head`."""
    for text in dict.fromkeys(found):
        info(head + text)


def unseen(found: Iterable[str]) -> None:
    """What could not be asked or read, so that an answer without it is not taken for the whole."""
    lines(found, "could not see: ")


def notes(found: Iterable[str]) -> None:
    """Remarks beside the answer."""
    lines(found, "note: ")


def next_step(command: str) -> None:
    """The command to type next; the last line of a verb that did something."""
    info(f"{paint('next:', 'bold', sys.stderr)} {command}")


def problems(found: Iterable[Problem]) -> None:
    """Every problem to stderr, in the order given."""
    for problem in found:
        head, _, rest = str(problem).partition(": ")
        info(f"{paint(head + ':', _LEVEL_COLOUR[problem.level], sys.stderr)} {rest}")


def tally(found: Sequence[Problem]) -> str:
    """How many errors and other remarks, in words."""
    errors = sum(problem.level == "error" for problem in found)
    counts = ((errors, "error"), (len(found) - errors, "other remark"))
    return (
        ", ".join(f"{n} {what}{'s' * (n != 1)}" for n, what in counts) if found else "no problems"
    )


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> None:
    """Rows to stdout: tab-separated when piped; on a terminal aligned columns, of which the widest
    are folded where a row is wider than it."""
    cells = [[shown(str(cell), keep="") for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for line in ([list(header)] if header else []) + cells:
            data("\t".join(line))
        return
    everything = ([list(header)] if header else []) + cells
    wanted = [max(map(_seen, column)) for column in zip(*everything)]
    widths = _fit(wanted, _columns())
    for number, line in enumerate(everything):
        for text in _folded(line, widths):
            data(paint(text, "bold") if header and number == 0 else text)


def _seen(cell: str) -> int:
    """How many characters of it are seen: colours take no room."""
    return len(re.sub(r"\x1b\[[0-9;]*m", "", cell))


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


_LEAST_WIDTH = 12  # a column is not folded to less: a few letters a line are harder to read


def _fit(widths: Sequence[int], columns: int) -> list[int]:
    """The widths with the widest columns narrowed until a row is no wider than `columns`, or they
    are at their least."""
    out = list(widths)
    excess = sum(out) + 2 * (len(out) - 1) - columns
    while excess > 0 and max(out) > _LEAST_WIDTH:
        widest = out.index(max(out))
        out[widest] -= 1
        excess -= 1
    return out


def _folded(line: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """The lines of a row whose cells are folded at blanks, or anywhere in a longer word."""
    import textwrap  # only here: few verbs fold a table

    cells = [
        textwrap.wrap(cell, width, break_on_hyphens=False)
        if len(cell) > width and "\x1b" not in cell
        else [cell]
        for cell, width in zip(line, widths)
    ]
    for parts in itertools.zip_longest(*cells, fillvalue=""):
        padded = (part + " " * (width - _seen(part)) for part, width in zip(parts, widths))
        yield "  ".join(padded).rstrip()


class Progress:
    """Progress of long work on stderr: one rewritten line on a terminal, one line per `every_s`
    otherwise."""

    def __init__(
        self, what: str, total: float | None = None, unit: str = "", every_s: float = 10.0
    ):
        self._what, self._total, self._unit = what, total, unit
        self._tty = sys.stderr.isatty()
        self._every_s = 0.1 if self._tty else every_s
        self._start = self._last = time.monotonic()

    def update(self, done: float, note: str = "", force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._last < self._every_s:
            return
        self._last = now
        elapsed = max(now - self._start, 1e-9)
        text = f"{self._what}: {done:,.0f}"
        if self._total:
            left_s = elapsed * (self._total - done) / done if done else float("inf")
            eta = f", {left_s:.0f}s left" if left_s != float("inf") else ""
            text += f"/{self._total:,.0f} {self._unit} ({100 * done / self._total:.0f}%{eta})"
        else:
            text += f" {self._unit}"
        if note:
            text += f"  {note}"
        sys.stderr.write(f"\r\033[K{text}" if self._tty else text + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """End the rewritten line, so that what follows starts on its own."""
        if self._tty:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


class Stages:
    """One progress line per stage of something that has several."""

    def __init__(self, every_s: float = 5.0) -> None:
        self._every_s, self._what = every_s, ""
        self._line: Progress | None = None

    def update(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self.close()
            self._what, self._line = what, Progress(what, total or None, every_s=self._every_s)
        if self._line is not None:
            self._line.update(done)

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
        self._line = None
