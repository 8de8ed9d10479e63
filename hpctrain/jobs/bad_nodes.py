"""Nodes that were named in two failures of a run, and keeping its links off them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hpctrain.base.units import compress_nodes, expand_nodes
from hpctrain.runs.records import RunRecords
from hpctrain.runs.starts import starts_of
from hpctrain.triage.records import job_of_log

MIN_FAILURES = 2
_TAIL_BYTES = 4 * 1024 * 1024
# What Slurm says of one node: `srun: error: nid000003: task 5: Killed`, `Node failure on
# nid000003`; and the job script of the first task that failed. Only deaths by a signal: an exit
# code is the program's own, and the same on any node. Nor by one that somebody sends, as the job
# script does before the time limit (HUP, INT, USR1, USR2, TERM: 129, 130, 138, 140, 143).
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


def find(run: RunRecords) -> list[BadNode]:
    """The nodes that the logs of at least two failed starts name, worst first.

    A start failed when it has an end with another exit code than 0, or no end at all. A failure
    that names more than two nodes, or half of them, says nothing about any one of them.
    """
    logs: dict[str, list[str]] = {}
    for path in run.logs:
        if path.endswith(".out"):
            logs.setdefault(job_of_log(path) or "", []).append(path)
    blamed: dict[str, list[str]] = {}
    for start in starts_of(run):
        for path in logs.get(start.job_id, []) if start.exit_code != 0 else []:
            for node in named(_part_of(_tail(path), start.restart), start.nodes):
                restart = f".{start.restart}" if start.restart else ""
                blamed.setdefault(node, []).append(start.job_id + restart)
    bad = [
        BadNode(node, tuple(starts))
        for node, starts in blamed.items()
        if len(starts) >= MIN_FAILURES
    ]
    return sorted(bad, key=lambda node: (-len(node.failures), node.name))


def named(log: str, whole: Sequence[str]) -> list[str]:
    """The nodes that one start's log blames, if few enough of `whole`, all it had, to mean
    something."""
    found: dict[str, None] = {}
    for pattern in _NAMED:
        for match in pattern.finditer(log):
            try:
                found.update(dict.fromkeys(expand_nodes(match["nodes"])))
            except ValueError:
                continue
    names = [node for node in found if not whole or node in whole]
    return (
        names
        if 0 < len(names) <= 2 and (not whole or 2 * len(names) < len(whole) or len(whole) == 1)
        else []
    )


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
            return log[
                mark.start() : marks[index + 1].start() if index + 1 < len(marks) else len(log)
            ]
    return log if not marks else ""
