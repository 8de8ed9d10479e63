"""What the job's own output tells of its steps while they run, read as it grows: whether there are
new ones, how long they take, and whether their figures are numbers.

Any framework's lines will do: a step is whatever number stands behind `step`, `iteration` and the
like, or in a progress bar, and is another than before.
"""

import os
import re
from typing import List, NamedTuple, Optional

_STEP = re.compile(
    rb"(?i)(?<![a-z/])(?:(?:global|train|training)[ _])?"
    rb"(?:step|iteration|iter|update|after|epoch)s?"
    rb"['\"]?\s*[:= #]\s*(\d+(?:\.\d+)?)|(\d+/\d+) \["
)
_LOSS = re.compile(rb"(?i)(?:loss|grad[_ ]norm)['\"]?\s*[:= ]\s*['\"]?(?:(nan|[-+]?inf)\b|[-+]?\d)")
# Work in which a program says nothing of steps for long.
_QUIET = re.compile(
    rb"(?i)evaluat|validat|checkpoint|saving|export|caching|tokeniz|compil|capturing|precomput"
)
FACTOR, PATIENCE = 5.0, 4.0
KNOWN_GAPS, FEW_GAPS = 50, 5
BAD_IN_A_ROW = 3
_MOST_BYTES = 16 * 1024 * 1024  # of one look; what is older is passed over


class State(NamedTuple):
    """Of the steps at one moment; times in seconds. `limit_s` is None as long as too few steps were
    seen to know how long one takes."""

    step: str
    median_s: Optional[float]
    silent_s: float
    limit_s: Optional[float]
    num_bad: int


class Progress:
    """The steps of one start, in the file `path` from its end at the time of the making on.
    `floor_s`: shorter silences are none."""

    def __init__(self, path: str, floor_s: float, now_s: float) -> None:
        self._path, self._floor_s = path, floor_s
        self._offset = _size(path)
        self._step = b""
        self._stepped_s: Optional[float] = None
        self._grown_s = now_s
        self._gaps: List[float] = []
        self._quiet = False
        self._num_bad = 0

    def look(self, now_s: float) -> State:
        """Read what is new."""
        text = self._new_text()
        if text:
            self._grown_s = now_s
            self._take(text, now_s)
        gaps = sorted(self._gaps)
        median_s = gaps[len(gaps) // 2] if len(gaps) >= FEW_GAPS else None
        limit_s = None
        if median_s is not None:
            limit_s = max(FACTOR * median_s, self._floor_s) * (PATIENCE if self._quiet else 1.0)
        return State(
            self._step.decode("ascii", "replace"),
            median_s,
            now_s - self._grown_s,
            limit_s,
            self._num_bad,
        )

    def _new_text(self) -> bytes:
        size = _size(self._path)
        if size < self._offset:
            self._offset = 0  # truncated: what is there now is new
        self._offset = max(self._offset, size - _MOST_BYTES)
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                text = file.read(size - self._offset)
        except OSError:
            return b""
        self._offset += len(text)
        return text

    def _take(self, text: bytes, now_s: float) -> None:
        steps = list(dict.fromkeys(first or second for first, second in _STEP.findall(text)))
        steps = [step for step in steps if step != self._step]
        if steps:
            if self._stepped_s is not None:
                each_s = (now_s - self._stepped_s) / len(steps)
                self._gaps = (self._gaps + [each_s])[-KNOWN_GAPS:]
            self._step, self._stepped_s = steps[-1], now_s
        last = text.rstrip().rpartition(b"\n")[2]
        self._quiet = bool(_QUIET.search(last))
        for line in text.splitlines():
            found = _LOSS.findall(line)
            if found:
                self._num_bad = self._num_bad + 1 if any(found) else 0


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0
