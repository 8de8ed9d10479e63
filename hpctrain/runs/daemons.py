"""What happened to Slurm's own daemons and to nodes while a run's jobs ran, as they tell it
themselves.

slurmctld says when it was started (`scontrol show config`, BOOT_TIME), each node when it booted and
when its slurmd was started (`scontrol show node`). Only the last start of each is known: what came
before a later one has left no trace.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hpctrain.base.errors import EnvironmentFault
from hpctrain.base.units import compress_nodes
from hpctrain.runs.starts import Start
from hpctrain.slurm import commands as slurm
from hpctrain.slurm.jobs import parse_time
from hpctrain.triage.records import utc

AFTER_S = 60.0  # a daemon that comes back so soon after a start's end was gone during it
_MOST = 20


@dataclass(frozen=True)
class Happening:
    """A daemon or node that began anew, or a node that cannot be used now (`time_s` None)."""

    what: str
    node: str | None = None
    time_s: float | None = None


_CONTROLLER = re.compile(r"^BOOT_TIME\s*=\s*(\S+)", re.MULTILINE)
_FIELD = re.compile(r"\b(NodeName|BootTime|SlurmdStartTime|State)=(\S+)")
_REASON = re.compile(r"\bReason=(.*?)(?:\s+\[([^\]@]*)@([^\]]*)\])?\s*$")


def read_happenings(config: str, nodes: str) -> list[Happening]:
    """Everything told by the text of `scontrol show config` and of `scontrol --oneliner show node
    …`, in UTC; pure."""
    out = []
    controller = _CONTROLLER.search(config)
    if controller and (started := parse_time(controller[1])) is not None:
        out.append(
            Happening(
                "Slurm's controller (slurmctld) was started again; jobs run on without it",
                None,
                started,
            )
        )
    for line in nodes.splitlines():
        facts = dict(_FIELD.findall(line))
        name = facts.get("NodeName")
        if not name:
            continue
        booted, daemon = (
            parse_time(facts.get("BootTime", "")),
            parse_time(facts.get("SlurmdStartTime", "")),
        )
        if booted is not None:
            out.append(Happening(f"{name} booted", name, booted))
        if daemon is not None and (booted is None or daemon > booted + 600):
            out.append(
                Happening(
                    f"the slurmd of {name} was started again; jobs run on without it", name, daemon
                )
            )
        state = facts.get("State", "")
        if any(
            word in state for word in ("DOWN", "DRAIN", "FAIL", "NOT_RESPONDING")
        ) or state.endswith("*"):
            reason = _REASON.search(line)
            why = f": {reason[1]}" if reason and reason[1] else ""
            out.append(Happening(f"{name} is {state} now{why}", name))
    return out


def ask(nodes: Sequence[str]) -> tuple[list[Happening], list[str]]:
    """Ask slurmctld of itself and of `nodes`, one call each; returns what happened and what could
    not be asked."""
    if not slurm.have("scontrol"):
        return [], []  # squeue is then missing as well, and that is said
    texts, unseen = [], []
    calls = [["config"], ["node", compress_nodes(list(nodes))]] if nodes else [["config"]]
    for what in calls:
        try:
            # Local time without a zone, unless TZ says UTC.
            done = slurm.ask(
                ["env", "TZ=UTC0", "scontrol", "--oneliner", "show", *what], timeout_s=60
            )
        except EnvironmentFault as error:
            return [], [f"scontrol: {error.problems[0].what}"]
        if done.returncode and not done.stdout.strip():
            unseen.append(
                f"scontrol show {what[0]}: {(done.stderr.strip() or 'no answer').splitlines()[-1]}"
            )
        texts.append(done.stdout)
    return read_happenings(texts[0], texts[1] if len(texts) > 1 else ""), unseen


def remarks(happenings: Iterable[Happening], starts: Sequence[Start], now_s: float) -> list[str]:
    """What of it touched the starts, in words; what came before the first or long after the last is
    not theirs.

    A start without an end on record is taken to run until `now_s`.
    """
    out = []
    for happening in happenings:
        if happening.time_s is None:
            out.append(happening.what)
            continue
        for start in starts:
            here = happening.node is None or happening.node in start.nodes
            end_s = now_s if start.end_s is None else start.end_s + AFTER_S
            if here and start.start_s is not None and start.start_s <= happening.time_s <= end_s:
                when = (
                    "while"
                    if start.end_s is None or happening.time_s <= start.end_s
                    else "right after"
                )
                out.append(f"{utc(happening.time_s)}, {when} {start.name} ran: {happening.what}")
                break
    return out[:_MOST]
