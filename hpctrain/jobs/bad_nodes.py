"""Nodes that were named in two failures of a run, and keeping its links off them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.base.units import compress_nodes, expand_nodes

MIN_FAILURES = 2
_TAIL_BYTES = 4 * 1024 * 1024
# What Slurm says of one node: `srun: error: nid000003: task 5: Killed`, `Node failure on nid000003`; and the job script of
# the first task that failed. Only deaths by a signal: an exit code is the program's own, and the same on any node. Nor by
# one that somebody sends, as the job script does before the time limit (HUP, INT, USR1, USR2, TERM: 129, 130, 138, 140, 143).
_SENT = "Terminated|Exited|Interrupt|Hangup|User defined signal"
_NAMED = (
    re.compile(rf"srun: error: (?P<nodes>[\w.,\[\]-]+): tasks? [\d,-]+: (?!{_SENT})[^\n]+"),
    re.compile(
        r"the first task to fail was rank \d+ on (?P<nodes>[\w.-]+), "
        r"with exit code 1(?:3[1-79]|4[124-9]|5\d)\b"
    ),
    re.compile(r"^hpctrain: preflight: (?P<nodes>[\w.-]+) is bad: ", re.MULTILINE),
    re.compile(r"[Nn]ode failure on (?P<nodes>[\w.,\[\]-]+)"),
    re.compile(r"JOB \d+ ON (?P<nodes>[\w.-]+) CANCELLED AT \S+ DUE TO NODE FAILURE"),
)
_BEGIN = re.compile(r"^hpctrain: job (?P<job>\d+), restart (?P<restart>\d+)", re.MULTILINE)


@dataclass(frozen=True)
class BadNode:
    """A node and the failures that named it, as `job id` or `job id.restart`."""

    name: str
    failures: tuple[str, ...]


def find(run_dir: str, links: Sequence[Mapping[str, Any]]) -> list[BadNode]:
    """The nodes that the logs of at least two failed starts name, worst first.

    A start failed when it has an end with another exit code than 0, or no end at all. A failure that names more than two
    nodes, or half of them, says nothing about any one of them.
    """
    failed = {(str(r["job_id"]), r.get("restart", 0)): r for r in links if r.get("event") == "begin" and "job_id" in r}
    for record in links:
        if record.get("event") == "end" and record.get("exit_code") == 0:
            failed.pop((str(record.get("job_id")), record.get("restart", 0)), None)
    blamed: dict[str, list[str]] = {}
    for (job_id, restart), record in failed.items():
        for path in glob.glob(os.path.join(glob.escape(os.path.join(run_dir, "logs")), f"*-{job_id}.out")):
            for node in named(_part_of(_tail(path), restart), str(record.get("nodes") or "")):
                blamed.setdefault(node, []).append(f"{job_id}.{restart}" if restart else job_id)
    bad = [BadNode(node, tuple(found)) for node, found in blamed.items() if len(found) >= MIN_FAILURES]
    return sorted(bad, key=lambda node: (-len(node.failures), node.name))


def named(log: str, allocated: str) -> list[str]:
    """The nodes that one start's log blames, if that are few enough to mean something."""
    try:
        whole = expand_nodes(allocated)
    except ValueError:
        whole = []
    found: dict[str, None] = {}
    for pattern in _NAMED:
        for match in pattern.finditer(log):
            try:
                found.update(dict.fromkeys(expand_nodes(match["nodes"])))
            except ValueError:
                continue
    names = [node for node in found if not whole or node in whole]
    return names if 0 < len(names) <= 2 and (not whole or 2 * len(names) < len(whole) or len(whole) == 1) else []


def merged(present: str, bad: Iterable[BadNode]) -> str:
    """Slurm's form of the nodes in `present` and the bad ones together."""
    names = expand_nodes(present) if present else []
    return compress_nodes(sorted({*names, *(node.name for node in bad)}))


def _tail(path: str) -> str:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        return file.read().decode("utf-8", "replace")


def _part_of(log: str, restart: int) -> str:
    """The lines of one start: a requeued job goes on in the same file."""
    marks = list(_BEGIN.finditer(log))
    for index, mark in enumerate(marks):
        if int(mark["restart"]) == restart:
            return log[mark.start() : marks[index + 1].start() if index + 1 < len(marks) else len(log)]
    return log if not marks else ""
