"""What the words of Slurm's commands mean. Pure.

The words are Slurm's own (src/common/slurm_errno.c, 19.05 to 26.05). Silence is not a refusal:
where no controller answered, nothing is known of what was asked.
"""

from __future__ import annotations

import re

_NO_CONFIG = re.compile(
    r"establish a configuration source|process configuration file|slurm\.conf: No such file"
)
_NO_ANSWER = re.compile(
    r"Unable to contact|Socket timed out|Zero Bytes were transmitted|standby mode"
    r"|Communication (?:connection|shutdown) failure|Message (?:send|receive) failure"
    r"|Unexpected message received|Unexpected missing socket|Insane message length"
    r"|Protocol (?:authentication error|version has changed)|Incompatible versions"
    r"|authentication (?:credential|plugin)|[Mm]unge|Unable to connect to database"
    r"|Problem talking to the database|open persistent connection|Connection refused"
    r"|Connection (?:timed out|reset)|No route to host"
)
# What a refusal is about, and the command that shows that limit. The first that fits is taken.
_SHOWN_BY = (
    (re.compile(r"licen[cs]e", re.I), "`scontrol show licenses`"),
    (re.compile(r"reservation", re.I), "`scontrol show reservation`"),
    (re.compile(r"feature|constraint", re.I), "`sinfo -o '%P %f'` shows the features of the nodes"),
    (re.compile(r"generic resource|gres", re.I), "`sinfo -o '%P %G'` shows the nodes' GPUs"),
    (
        re.compile(r"account|association|Assoc|qos", re.I),
        "`sacctmgr show assoc user=$USER` and `sacctmgr show qos`",
    ),
    (re.compile(r"node (?:name|count|configuration)|nodelist|memory", re.I), "`sinfo -N -l`"),
    (re.compile(r"dependency|job id", re.I), "`squeue --me`"),
)


def no_answer(words: str) -> str:
    """What to do where `words` say that no Slurm answered; "" where they are an answer."""
    if _NO_CONFIG.search(words):
        return (
            "this machine's Slurm commands have no configuration: use a login node, or `hpctrain"
            " sandbox up`"
        )
    return "is slurmctld up? try `scontrol ping`" if _NO_ANSWER.search(words) else ""


def shown_by(words: str) -> str:
    """How to see the limit that a refusal names."""
    for pattern, command in _SHOWN_BY:
        if pattern.search(words):
            return command if " shows " in command else f"{command} shows what there is"
    return "`scontrol show partition` shows the limits"


_NOT_NOW = re.compile(
    r"node configuration is not available|nodes? (?:are busy|not available)|Nodes required for job"
)
_USABLE = {"idle", "allocated", "mixed", "completing", "planned", "powering_up", "powered_down"}


def says_not_now(words: str) -> bool:
    """Whether `sbatch --test-only` may only mean that the nodes are down, drained or reserved now:
    it has one sentence for that and for what no node has, and sbatch would take the first
    (src/slurmctld/job_scheduler.c, job_start_data)."""
    return bool(_NOT_NOW.search(words))


def may_be_down(nodes: str, num_nodes: int) -> bool:
    """Whether a job of so many nodes may only lack nodes that are down, drained or reserved now.

    `nodes` is what sinfo prints, a line a node: availability, state, and what the node has. Not so
    where each kind of node in it has enough usable ones, or none that is not.
    """
    kinds: dict[str, list[bool]] = {}
    for line in nodes.splitlines():
        available, state, kind = (line.split("|", 2) + ["", ""])[:3]
        usable = available == "up" and re.sub(r"[^a-z_]+$", "", state) in _USABLE
        kinds.setdefault(kind, []).append(usable)
    return any(sum(kind) < num_nodes and not all(kind) for kind in kinds.values())


# Reasons of a waiting job (man squeue, JOB REASON CODES) that do not pass by themselves: what the
# job is then, and what changes that. {job} is its id.
_STUCK = (
    (r"JobHeldAdmin", "held by the administrators, who alone can release it", ""),
    (
        r"JobHeldUser|JobHoldMaxRequeue|held[ _]state|requeued[ _]held",
        "held: it will not start by itself",
        "scontrol release {job}",
    ),
    (
        r"DependencyNeverSatisfied",
        "the job that it waits for has ended in another way: it will never start",
        "scontrol update jobid={job} dependency=",
    ),
    (
        r"BadConstraints|PartitionConfig|Partition(?:Node|Time)Limit|Max\w+Per(?:Job"
        r"|Node)(?:Limit)?$|QOSMin",
        "it asks for what no job gets there: it will never start",
        "scancel {job}",
    ),
    (
        r"InvalidAccount|InvalidQOS|(?:Account|QOS)NotAllowed|Reservation(?:Deleted"
        r"|Invalid)|DeadLine",
        "its account, QOS, reservation or deadline does not hold any more: it will never start",
        "scancel {job}",
    ),
    (
        r"Grp(?!\w*Run)\w*Minutes|GrpWall",
        "the time of its account or QOS is used up: it waits until there is more",
        "",
    ),
)
_HELD_STATES = frozenset({"REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"})


def stuck(job_id: str, state: str, reason: str) -> tuple[str, str]:
    """(what keeps a waiting job until a person acts, the command for it); empty where time will
    do."""
    if state in _HELD_STATES:
        reason = "held state"
    for pattern, what, command in _STUCK:
        if re.search(pattern, reason):
            return what, command.format(job=job_id)
    return "", ""
