"""However a log is made up, triage's time is bounded by its bytes, and what it finds is the same."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.triage import exceptions
from hpctrain.triage.engine import Engine
from hpctrain.triage.exceptions import HEADER, MOST


def ranks(count, label):
    """Tracebacks of ranks that crash in step and print line by line."""
    lines = [HEADER.decode() + ":"]
    for depth in range(12):
        lines += [
            f'  File "/opt/site-packages/deepspeed/engine_{depth}.py", line {depth}, in forward',
            f"    return self.module_{depth}(*inputs, **kwargs)",
        ]
    lines.append("torch.OutOfMemoryError: HIP out of memory. Tried to allocate 2.00 GiB.")
    return "".join(f"{label.format(rank)}{line}\n" for line in lines for rank in range(count))


LOGS = {
    "headers alone": lambda size: f"{HEADER.decode()}:\n" * (size // 35),
    "headers that differ": lambda size: "".join(
        f"{i:x}g: {HEADER.decode()}:\n" for i in range(size // 42)
    ),
    "ranks": lambda size: ranks(size // 1700, ""),
    "labelled ranks": lambda size: ranks(size // 1900, "[rank{}]: "),
    "one line": lambda size: ("{'loss': " + "x" * 90) * (size // 99) + "\n",
    "one line of anchors": lambda size: "{'loss': " * (size // 9) + "\n",
    "tracebacks in one line": lambda size: (
        (HEADER.decode() + ":\\n ValueError: x\\n") * (size // 60) + "\n"
    ),
}


def seconds(text):
    begun = time.process_time()
    reader = Engine().log("x.log")
    for at in range(0, len(text), 256 * 1024):
        reader.feed(text[at : at + 256 * 1024])
    reader.close()
    return time.process_time() - begun


@pytest.mark.parametrize("kind", LOGS)
def test_time_grows_with_the_bytes_and_no_faster(kind):
    make = LOGS[kind]
    seconds(make(20_000).encode())
    small, large = (seconds(make(size).encode()) for size in (200_000, 1_600_000))

    assert large < 16 * small + 0.5, (small, large)
    assert large < 12


def one_by_one(text, position):
    """What `LastLines.of` promises, read line by line."""
    start = text.rfind(b"\n", max(position - 400, 0), position) + 1
    start = max(start, text.rfind(b"\r", start, position) + 1)
    prefix = text[start:position]
    flat = bytes.maketrans(b"123456789", b"0" * 9)
    at = text.find(b"\n", position) + 1
    while 0 < at < min(len(text), position + MOST):
        end = text.find(b"\n", at)
        if end < 0:
            return None
        line = text[at:end]
        if line[: len(prefix)].translate(flat) == prefix.translate(flat):
            body = line[len(prefix) : len(prefix) + 400]
            if exceptions._LAST.match(body) and not exceptions._NO_CLASS.match(body):
                return at, end
        at = end + 1
    return None


PIECES = ["", "[rank1]: ", "[rank12]: ", "0: ", "  File x", "ValueError: x", "a.B", "Killed", "\r"]
LINES = st.lists(st.sampled_from([HEADER.decode() + ":", *PIECES]), max_size=3).map("".join)


@given(st.lists(LINES, max_size=30).map("\n".join), st.booleans())
def test_every_traceback_ends_where_it_would_alone(text, ended):
    raw = text.encode() + b"\n" * ended
    ends, position, found = exceptions.LastLines(raw), raw.find(HEADER), []
    while position >= 0:
        found.append(position)
        assert ends.of(position) == one_by_one(raw, position)
        position = raw.find(HEADER, position + 1)
    begin = -1
    while found and one_by_one(raw, found[-1]) is None:
        begin = raw.rfind(b"\n", 0, found.pop()) + 1
    assert exceptions.is_open(raw) == begin
