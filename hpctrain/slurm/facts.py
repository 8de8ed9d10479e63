"""What Slurm says of itself, read from text: `scontrol show partition`, `show node`, `show config`,
and `sinfo`.

Pure: text in, facts out, whatever the text holds. Formats: man scontrol, man sinfo (20.11 to
24.11), both the usual form of several lines a record and the one-line form of `-o`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hpctrain.base.units import expand_nodes, parse_mem_gib, parse_time_s

# These hold free text, spaces and `=` included, and stand on a line of their own: never read keys
# out of them.
_FREE_TEXT = re.compile(r"\s*(?:OS|Reason|Comment|AdminComment|Extra|JobDefaults|ResumeAfterTime)=")
_PAIR = re.compile(r"(?:^|\s)([A-Za-z][A-Za-z0-9_/:]*)=(\S*)")
_CONFIG_LINE = re.compile(r"([A-Za-z][A-Za-z0-9_]*)\s+=\s(.*)\Z")
_GRES = re.compile(r"gpu(?::([A-Za-z0-9_.+-]+?))?(?::(\d+))?\Z")
_UNLIMITED = frozenset({"", "UNLIMITED", "INFINITE", "NONE", "N/A", "(NULL)"})


@dataclass(frozen=True, order=True)
class NodeShape:
    """What makes two nodes the same kind. Memory in MiB, as Slurm counts; `usable_cores` without
    reserved ones."""

    sockets: int
    cores: int
    threads_per_core: int
    usable_cores: int
    mem_mib: int
    num_gpus: int
    gpu_type: str


@dataclass(frozen=True)
class PartitionFacts:
    """One partition's limits; None where Slurm sets none. `nodes` as named by the partition
    itself."""

    name: str
    max_time_s: int | None = None
    max_nodes: int | None = None
    min_nodes: int | None = None
    whole_nodes: bool = False
    qos_of_partition: str = ""
    required_qos: str = ""
    remarks: tuple[str, ...] = ()
    nodes: frozenset[str] = frozenset()
    average: NodeShape | None = None


@dataclass(frozen=True)
class Facts:
    """Everything recognised, and how much was not (`skipped`: one line each)."""

    config: Mapping[str, str] = field(default_factory=dict)
    partitions: tuple[PartitionFacts, ...] = ()
    nodes: Mapping[str, NodeShape] = field(default_factory=dict)
    node_partitions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


def read_facts(texts: Iterable[str]) -> Facts:
    """The facts in any mixture of those outputs, in any order; a partition or node named twice
    counts once."""
    config: dict[str, str] = {}
    partitions: dict[str, PartitionFacts] = {}
    nodes: dict[str, NodeShape] = {}
    members: dict[str, tuple[str, ...]] = {}
    skipped: list[str] = []
    tables: list[list[str]] = []
    for text in texts:
        for kind, lines in _records(text):
            if kind == "config":
                match = _CONFIG_LINE.match(lines[0])
                if match:
                    config.setdefault(match[1], match[2].strip())
            elif kind == "table":
                tables.append(lines)
            else:
                pairs = _pairs(lines)
                name = pairs.get(kind, "")
                if kind == "PartitionName":
                    partitions.setdefault(name, _partition(name, pairs))
                    continue
                shape = _node(pairs)
                if shape is None:
                    skipped.append(f"node `{name}` lacks its cores or memory")
                else:
                    nodes.setdefault(name, shape)
                    members.setdefault(
                        name, tuple(filter(None, pairs.get("Partitions", "").split(",")))
                    )
    seen: dict[str, PartitionFacts] = {}
    for lines in tables:
        _read_sinfo(lines, seen, nodes, members)
    partitions = {**seen, **partitions}
    return Facts(config, tuple(partitions.values()), nodes, members, tuple(skipped))


def parse_gres(text: str) -> tuple[int, str]:
    """(GPUs, their type) of a Gres such as `gpu:a100:4(S:0-1),craynetwork:4`; an empty type when
    there are several."""
    total, types = 0, set()
    for item in re.sub(r"\([^()]*\)", "", text).split(","):
        match = _GRES.match(item.strip())
        if not match:
            continue
        kind, count = match.groups()
        if kind and kind.isdigit() and count is None:
            kind, count = None, kind  # gpu:8
        total += int(count or 1)
        types.add(kind or "")
    return total, types.pop() if len(types) == 1 else ""


def _records(text: str) -> Iterable[tuple[str, list[str]]]:
    """(kind, lines) of each record; kind is PartitionName, NodeName, config or table."""
    current: tuple[str, list[str]] | None = None
    for line in re.sub(r"[^\S\n]|[\x00-\x08\x0e-\x1f\x7f]", " ", text.replace("\r", "")).split(
        "\n"
    ):
        start = re.match(r"(PartitionName|NodeName)=", line)
        header = "PARTITION" in line.split()
        if start or header or _CONFIG_LINE.match(line):
            if current:
                yield current
            other = "table" if header else "config"
            current = (start[1] if start else other, [line])
        elif not line.strip():
            if current and current[0] != "table":
                yield current
                current = None
        elif current and (line[0] == " " or current[0] == "table"):
            current[1].append(line)
    if current:
        yield current


def _pairs(lines: list[str]) -> dict[str, str]:
    """KEY=VALUE of a record; the first of a name counts, so that free text later cannot replace
    it."""
    found: dict[str, str] = {}
    for line in lines:
        if not _FREE_TEXT.match(line):
            for key, value in _PAIR.findall(line):
                found.setdefault(key, value)
    return found


def _partition(name: str, pairs: Mapping[str, str]) -> PartitionFacts:
    allowed = pairs.get("AllowQos", "ALL")
    required = "" if allowed in ("ALL", "") or "," in allowed else allowed
    rules = [
        (pairs.get("State", "UP") != "UP", f"its state was {pairs.get('State')}"),
        (pairs.get("RootOnly") == "YES", "only root may submit"),
        (pairs.get("ReqResv") == "YES", "jobs need a reservation"),
    ]
    for key in ("AllowAccounts", "AllowGroups"):
        rules.append((pairs.get(key, "ALL") not in ("ALL", ""), f"{key}={pairs.get(key)}"))
    rules.append(("," in allowed, f"AllowQos={allowed}: jobs must name one of them"))
    qos = pairs.get("QoS", "N/A")
    return PartitionFacts(
        name=name,
        max_time_s=_read(parse_time_s, pairs.get("MaxTime", "")),
        max_nodes=_count(pairs.get("MaxNodes", "")),
        min_nodes=_count(pairs.get("MinNodes", "")),
        whole_nodes=pairs.get("OverSubscribe", pairs.get("Shared", "")).upper() == "EXCLUSIVE",
        qos_of_partition="" if qos.upper() in _UNLIMITED else qos,
        required_qos=required,
        remarks=tuple(remark for holds, remark in rules if holds),
        nodes=frozenset(_read(expand_nodes, pairs.get("Nodes", ""), [])),
        average=_average(pairs),
    )


def _average(pairs: Mapping[str, str]) -> NodeShape | None:
    """A node's share of the partition's totals, for when no node was shown."""
    cpus, num_nodes = _count(pairs.get("TotalCPUs", "")), _count(pairs.get("TotalNodes", ""))
    if not cpus or not num_nodes:
        return None
    tres = dict(item.split("=", 1) for item in pairs.get("TRES", "").split(",") if "=" in item)
    cores = max(cpus // num_nodes, 1)
    mem_gib = _read(parse_mem_gib, tres.get("mem", "")) or 1.0
    gpus = (_count(tres.get("gres/gpu", "")) or 0) // num_nodes
    return NodeShape(1, cores, 1, cores, max(int(mem_gib * 1024 / num_nodes), 1), min(gpus, 64), "")


def _node(pairs: Mapping[str, str]) -> NodeShape | None:
    threads = _count(pairs.get("ThreadsPerCore", "")) or 1
    sockets, per_socket = _count(pairs.get("Sockets", "")), _count(pairs.get("CoresPerSocket", ""))
    cpus, mem_mib = _count(pairs.get("CPUTot", "")), _count(pairs.get("RealMemory", ""))
    cores = (cpus or 0) // threads
    if sockets and per_socket:
        cores = sockets * per_socket
    if not cores or not mem_mib or "Gres" not in pairs and "CPUTot" not in pairs:
        return None
    # CPUs without those reserved for the system; since Slurm 22.05
    effective = _count(pairs.get("CPUEfctv", ""))
    reserved = _count(pairs.get("CoreSpecCount", "")) or 0
    usable = effective // threads if effective and effective < (cpus or 0) else cores - reserved
    mem_mib -= _count(pairs.get("MemSpecLimit", "")) or 0
    num_gpus, gpu_type = parse_gres(pairs.get("Gres", ""))
    return _shape(sockets or 1, cores, threads, usable, mem_mib, num_gpus, gpu_type)


def _shape(
    sockets: int, cores: int, threads: int, usable: int, mem_mib: int, num_gpus: int, gpu_type: str
) -> NodeShape | None:
    """A shape within what a profile can say, or None for numbers that no node has."""
    if not 1 <= cores <= 4096 or mem_mib < 103 or num_gpus > 64:
        return None
    usable = usable if 1 <= usable <= cores else cores
    return NodeShape(
        max(sockets, 1), cores, min(max(threads, 1), 8), usable, mem_mib, num_gpus, gpu_type[:64]
    )


def _read_sinfo(
    lines: list[str],
    partitions: dict[str, PartitionFacts],
    nodes: dict[str, NodeShape],
    members: dict[str, tuple[str, ...]],
) -> None:
    """Add what a table of sinfo says about partitions, and about nodes that scontrol did not
    show."""
    header = [column.upper() for column in lines[0].split()]
    found: dict[str, tuple[int | None, set[str]]] = {}
    for line in lines[1:]:
        words = line.split()
        if len(words) < len(header):
            continue  # cut off
        row = dict(zip(header, words))
        name = row["PARTITION"].rstrip("*")
        names = _read(expand_nodes, row.get("NODELIST", ""), [])
        limit, seen = found.setdefault(name, (_read(parse_time_s, row.get("TIMELIMIT", "")), set()))
        seen.update(names)
        sct = [_count(part) or 1 for part in row.get("S:C:T", "").split(":")]
        sockets, per_socket, threads = sct if len(sct) == 3 else (1, 0, 1)
        cores = sockets * per_socket or _count(row.get("CPUS", "").rstrip("+")) or 0
        mem_mib = _count(row.get("MEMORY", "").rstrip("+")) or 0
        shape = _shape(sockets, cores, threads, cores, mem_mib, *parse_gres(row.get("GRES", "")))
        if shape:
            for node in names:
                nodes.setdefault(node, shape)
                members[node] = (
                    *members.get(node, ()),
                    *([] if name in members.get(node, ()) else [name]),
                )
    for name, (limit, seen) in found.items():
        before = partitions.get(name, PartitionFacts(name))
        partitions[name] = replace(
            before, max_time_s=before.max_time_s or limit, nodes=before.nodes | seen
        )


def _count(text: str) -> int | None:
    """A positive whole number, or None for UNLIMITED, zero and everything else."""
    match = re.match(r"(\d{1,15})", text, re.ASCII)
    return int(match[1]) or None if match else None


def _read(parse: Callable[[str], Any], text: str, otherwise: Any = None) -> Any:
    """What `parse` makes of a text; `otherwise` for no limit, and where it understands nothing."""
    try:
        return otherwise if text.upper() in _UNLIMITED else parse(text)
    except ValueError:
        return otherwise
