"""A log as the program meant it: without colours, without a container's JSON around each line, and
a line without what launchers and loggers put before it."""

from __future__ import annotations

import json
import re

_ESCAPES = re.compile(
    rb"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b\n]{0,200}(?:\x07|\x1b\\)|[@-Z\\^_])"
    rb"|(?:\^\[|#033|\\u001b|\\x1b|\\033)\[[0-9;]{0,12}m"
)
# What is left of colours where somebody copied the text: `[36m(Worker pid=1)[0m`.
_BARE = re.compile(rb"\[(?:\d{1,2};)*\d{1,2}m(?![\w ]*\])")
_LOOK = 16 * 1024  # bytes
_MARKS = (b"[0m", b"[39m", b"^[[", b"#033[", b"\\u001b[", b"\\x1b[", b"\\033[")
_JSON = re.compile(rb'^\{"(?:log|message|msg|line)": ?"[^\n]*\}[ \r]*$', re.MULTILINE)
_JSON_MARKS = (b'{"log":', b'{"message":', b'{"msg":', b'{"line":')

# One of these, again and again: launchers' labels, containers, journals, loggers' times.
_PREFIX = re.compile(
    rb"(?:\s*(?:"
    rb"\[(?:rank|default|worker|r)\s?\d+\]:?|\[\d+,\d+\]<std(?:out|err)>:|\d{1,5}: |\[\d+\](?::| )"
    rb"|\((?:[\w.:-]+ )?pid=\d+(?:, ip=[\d.]+)?\)(?: \[repeated[^\]\n]*\])?"
    rb"|\(\w+ pid=\d+\)"
    rb"|[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \S+ \S+\[\d+\]:"
    rb"|\[?\d{4}[-/]\d\d[-/]\d\d[T _]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?\]?"
    rb"(?: std(?:out|err) [FP])?"
    rb"|\[?\d\d[-/]\d\d(?:[-/]\d{4})? \d\d:\d\d:\d\d(?:[.,]\d+)?\]?"
    rb"|\[?\d\d:\d\d:\d\d(?:[.,]\d+)?\]?"
    rb"|(?:- )?\[?(?:DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL)\]?(?: +\||:| -)?(?=\s)"
    rb"|[-|](?= )"
    rb")(?=\s|[^\w]|(?<=[\s:>\])])))+\s?"
)


def plain(text: bytes) -> bytes:
    """Whole lines without escape sequences, and out of the JSON in which container engines wrap
    them; as many lines as before."""
    return Undresser().plain(text)


class Undresser:
    """`plain` for a log that comes in pieces: what its lines wear is looked for at the beginning
    of each piece only, for all of them wear it; true escape sequences everywhere."""

    def __init__(self) -> None:
        self._json = self._spelled = False

    def plain(self, text: bytes) -> bytes:
        look = text[:_LOOK]
        self._json = self._json or any(mark in look for mark in _JSON_MARKS)
        self._spelled = self._spelled or any(mark in look for mark in _MARKS)
        if self._json:
            text = _JSON.sub(_unwrap, text)
        if b"\x1b" in text or self._spelled:
            text = _ESCAPES.sub(b"", text)
        return _BARE.sub(b"", text) if self._spelled else text


def _unwrap(found: re.Match[bytes]) -> bytes:
    try:
        record = json.loads(found[0])
    except ValueError:
        return found[0]
    said = next((record[key] for key in ("log", "message", "msg", "line") if key in record), None)
    if not isinstance(said, str) or not (len(record) == 1 or _names_a_log(record)):
        return found[0]
    return said.rstrip("\n").replace("\n", " ").encode("utf-8", "replace")


def _names_a_log(record: dict[str, object]) -> bool:
    """Whether the JSON is a logger's: it tells a stream, a time or a level beside the text."""
    return any(key in record for key in ("stream", "time", "timestamp", "ts", "level", "severity"))


def without_prefix(line: bytes) -> bytes:
    """The line as the program printed it, as far as is known what stands before it."""
    found = _PREFIX.match(line)
    return line[found.end() :] if found else line
