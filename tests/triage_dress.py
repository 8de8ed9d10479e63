"""The same log in the clothes that launchers, containers, journals and loggers put on each line."""

from __future__ import annotations

import json
import re


def _each(make):
    def dress(text: bytes) -> bytes:
        lines = text.split(b"\n")
        return b"\n".join(make(i, line) if line.strip() else line for i, line in enumerate(lines))

    return dress


def _docker(text: bytes) -> bytes:
    lines = (line.decode("utf-8", "replace") for line in text.split(b"\n"))
    record = {"stream": "stdout", "time": "2026-05-18T16:04:46Z"}
    return b"\n".join(json.dumps({"log": line + "\n", **record}).encode() for line in lines)


def _clock(i: int) -> bytes:
    return b"2026-05-18%s16:%02d:%02d" % (b"T", i // 60 % 60, i % 60)


DRESSES = {
    "srun --label": _each(lambda i, line: b"0: " + line),
    "kubectl": _each(lambda i, line: _clock(i) + b".338112211Z " + line),
    "containerd": _each(lambda i, line: _clock(i) + b".338112211Z stdout F " + line),
    "mpirun": _each(lambda i, line: b"[1,0]<stdout>:" + line),
    "torchrun --tee": _each(lambda i, line: b"[default0]:" + line),
    "time in brackets": _each(lambda i, line: b"[" + _clock(i).replace(b"T", b" ") + b"] " + line),
    "journald": _each(
        lambda i, line: b"May 18 16:%02d:%02d node-7 run[811]: " % (i // 60 % 60, i % 60) + line
    ),
    "Ray": _each(lambda i, line: b"\x1b[36m(TrainWorker pid=811, ip=10.0.0.7)\x1b[0m " + line),
    "coloured lines": _each(lambda i, line: b"\x1b[32m" + line + b"\x1b[0m"),
    "coloured words": _each(
        lambda i, line: (
            re.sub(rb"(\w+):", lambda m: b"\x1b[32m" + m[1] + b"\x1b[39m:", line)
            if b"\x1b" not in line
            else line
        )
    ),
    "docker": _docker,
    "line numbers": _each(lambda i, line: b"[%d] " % (i + 1) + line),
}
