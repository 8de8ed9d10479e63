"""A first site profile from what Slurm says of itself: every value to be checked by a person, none
of them verified."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import IO

from hpctrain.base.errors import EnvironmentFault, Problem, UsageError
from hpctrain.base.units import format_time
from hpctrain.config.document import parse_yaml
from hpctrain.config.site import NAME, PARTITION_NAME, site_from_document
from hpctrain.config.text import block, comment, scalar
from hpctrain.slurm import commands as slurm
from hpctrain.slurm.facts import Facts, NodeShape, PartitionFacts, read_facts

_TODO = "TODO: check"
_MAX_BYTES = 64 * 1024 * 1024
_DEBUG = re.compile(
    r"(?:^|[-_.])(?:debug|dbg|dev|devel|test|short|interactive)(?:$|[-_.0-9])", re.IGNORECASE
)
# By the names that sites give their GPU types; only a hint for the person who checks.
_VENDORS = (
    ("amd", re.compile(r"mi\d", re.I)),
    ("intel", re.compile(r"pvc|max\d|ponte", re.I)),
    ("nvidia", re.compile(r"[ahvbptl]\d|gh|gb|rtx|tesla|nvidia|quadro|\d+g\.\d+gb", re.I)),
)


def draft_from_files(
    name: str, files: Sequence[str], stdin: IO[bytes]
) -> tuple[str, list[Problem]]:
    """(the profile, remarks) from recorded output; `-` is stdin. Raises EnvironmentFault for files
    that cannot be read."""
    texts = []
    for path in files:
        try:
            if path == "-":
                raw = stdin.read(_MAX_BYTES + 1)
            else:
                with open(path, "rb") as file:
                    raw = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise EnvironmentFault(f"cannot read it: {error.strerror}", where=path) from error
        if len(raw) > _MAX_BYTES:
            raise UsageError(f"larger than {_MAX_BYTES // 1024**2} MiB", where=path)
        texts.append(raw.decode("utf-8", "replace"))
    return _draft(name, texts)


def draft_from_slurm(name: str) -> tuple[str, list[Problem]]:
    """(the profile, remarks) from the Slurm that answers here."""
    return _draft(name, [slurm.show(what) for what in ("config", "partition", "node")])


def _draft(name: str, texts: Sequence[str]) -> tuple[str, list[Problem]]:
    facts = read_facts(texts)
    text = draft_profile(name, facts)
    # What was drafted must load: a profile that does not would help nobody.
    site_from_document(parse_yaml(text, name))
    notes = [Problem(f"left out: {line}", level="warning") for line in facts.skipped[:5]]
    if not facts.nodes:
        notes.append(
            Problem(
                "no node was shown, so the node types are guesses",
                level="warning",
                hint="add `scontrol show node`",
            )
        )
    if not facts.config:
        notes.append(
            Problem("no configuration was shown", level="note", hint="add `scontrol show config`")
        )
    return text, notes


def draft_profile(name: str, facts: Facts) -> str:
    """The text of a profile that loads. Raises UsageError when the facts name no partition and no
    node."""
    if not re.fullmatch(NAME, name, re.ASCII):
        raise UsageError(f"`{name}` is not a name for a site", why=f"allowed: {NAME}")
    usable = [p for p in facts.partitions if re.fullmatch(PARTITION_NAME, p.name, re.ASCII)]
    if not usable and not facts.nodes:
        raise UsageError(
            "no partition and no node was found in it",
            hint=(
                "give the output of `scontrol show partition`, `scontrol show node` and `scontrol"
                " show config`"
            ),
        )
    shapes = {partition.name: _shapes_of(partition, facts) for partition in usable}
    all_shapes = Counter(facts.nodes.values())
    for counted in shapes.values():
        all_shapes.update({shape: 0 for shape in counted if shape not in all_shapes})
    if not all_shapes:
        all_shapes[NodeShape(1, 1, 1, 1, 1024, 0, "")] = 0
    kinds = _kind_names(all_shapes)
    lines = [
        *comment(
            f"Drafted by `hpctrain site new` from this Slurm's own words; {_TODO} every value, then"
            " test it with"
        ),
        *comment(f"`hpctrain site check {name}`. Comments above a value say why it is so."),
        *block("name", name),
        f"title: {scalar(name)} # {_TODO}: what people call the machine",
        f"# docs_url: https://… # {_TODO}",
        f"maintainers: [] # {_TODO}: who answers questions about this profile",
        *comment(
            'verified: never. Fill in {date: "YYYY-MM-DD", by: …, slurm: …, evidence: …} once a job'
            " ran."
        ),
        *_skipped(facts, usable),
        *_match(facts.config),
        *_account(facts.config),
        *_slurm(facts, all_shapes),
        "",
        *_node_types(kinds, all_shapes),
        "",
        *_partitions(usable, shapes, kinds),
        *_rest(usable, shapes, kinds),
    ]
    return "\n".join(lines) + "\n"


def _shapes_of(partition: PartitionFacts, facts: Facts) -> Counter[NodeShape]:
    """How many nodes of each shape a partition has."""
    members = [node for node, names in facts.node_partitions.items() if partition.name in names]
    members = members or [node for node in partition.nodes if node in facts.nodes]
    counted = Counter(facts.nodes[node] for node in members)
    if not counted and partition.average:
        counted[partition.average] = 0
    return counted


def _kind_names(shapes: Mapping[NodeShape, int]) -> dict[NodeShape, str]:
    """A readable, unique name for each shape, the same whatever the order of the input."""
    names: dict[NodeShape, str] = {}
    ordered = sorted(shapes, key=lambda s: (-s.num_gpus, -s.cores, -s.mem_mib, s))
    short = {shape: _short_name(shape) for shape in ordered}
    for shape in ordered:
        name = short[shape]
        if sum(other == name for other in short.values()) > 1:
            name = f"{name}-{shape.mem_mib // 1024}g"
        number, unique = 2, name
        while unique in names.values():
            unique, number = f"{name}-{number}", number + 1
        names[shape] = unique
    return names


def _short_name(shape: NodeShape) -> str:
    gpu_type = re.sub(r"[^A-Za-z0-9]+", "-", shape.gpu_type).strip("-")[:30]
    return (
        f"gpu-{gpu_type}-{shape.num_gpus}".replace("--", "-")
        if shape.num_gpus
        else f"cpu-{shape.cores}"
    )


def _skipped(facts: Facts, usable: Sequence[PartitionFacts]) -> list[str]:
    odd = len(facts.partitions) - len(usable)
    lines = (
        comment(f"{_TODO}: {odd} partitions were left out, their names are not plain words")
        if odd
        else []
    )
    if facts.skipped:
        more = f", and {len(facts.skipped) - 3} more" if len(facts.skipped) > 3 else ""
        lines += comment(f"{_TODO}: left out: {'; '.join(facts.skipped[:3])}{more}")
    return lines


def _match(config: Mapping[str, str]) -> list[str]:
    cluster = config.get("ClusterName", "")
    if not cluster or not cluster.isprintable() or len(cluster) > 200:
        return []
    return ["match:", *block("cluster_name", cluster, 2)]


def _account(config: Mapping[str, str]) -> list[str]:
    if "associations" not in config.get("AccountingStorageEnforce", ""):
        return []
    return [
        "account:",
        (
            f"  required: true # AccountingStorageEnforce has associations; {_TODO}, and give an"
            " example"
        ),
        "  # example: my_project",
    ]


def _slurm(facts: Facts, shapes: Mapping[NodeShape, int]) -> list[str]:
    config, has_gpus = facts.config, any(shape.num_gpus for shape in shapes)
    lines = ["slurm:"]
    version = config.get("SLURM_VERSION", "")
    if re.fullmatch(r"[0-9A-Za-z.-]{1,30}", version):
        lines.append(f"  # Slurm {version}")
    request = "gres" if has_gpus else "none"
    lines += [
        (
            f"  gpu_request: {request} # {_TODO}: what the site recommends"
            if has_gpus
            else f"  gpu_request: {request}"
        )
    ]
    size = config.get("MaxArraySize", "")
    if re.fullmatch(r"[1-9]\d{0,8}", size, re.ASCII):
        lines.append(f"  max_array_size: {size} # scontrol show config")
    else:
        lines.append(
            f"  max_array_size: 1001 # Slurm's default; {_TODO} MaxArraySize in `scontrol show"
            " config`"
        )
    if config.get("JobRequeue") in ("0", "1"):
        lines.append(
            f"  requeue: {'true' if config['JobRequeue'] == '1' else 'false'} # JobRequeue"
        )
    else:
        lines.append(f"  requeue: true # {_TODO}")
    if any(shape.threads_per_core > 1 for shape in shapes):
        lines += comment(
            "Slurm counts hardware threads as CPUs, and this profile counts cores: one thread"
            " each.",
            2,
        )
        lines.append("  hint: nomultithread")
    return lines


def _node_types(kinds: Mapping[NodeShape, str], shapes: Mapping[NodeShape, int]) -> list[str]:
    lines = ["node_types:"]
    for shape, name in kinds.items():
        count = shapes[shape]
        unseen = "from a partition's totals; no node was shown"
        seen = f"{count} node{'s' * (count > 1)}" if count else unseen
        lines += [
            f"  # {seen}",
            f"  {scalar(name)}:",
            f"    sockets: {shape.sockets}",
            f"    cores: {shape.cores}",
        ]
        if shape.threads_per_core > 1:
            lines.append(f"    threads_per_core: {shape.threads_per_core}")
        why = (
            "less those Slurm reserves"
            if shape.usable_cores < shape.cores
            else f"{_TODO}: some may be reserved"
        )
        lines.append(f"    usable_cores: {shape.usable_cores} # {why}")
        lines.append(
            f"    memory_gib: {int(shape.mem_mib / 1024 * 100) / 100:g} # RealMemory; {_TODO} what"
            " jobs may use"
        )
        if shape.num_gpus:
            lines.append(f"    gpus: {shape.num_gpus}")
            if re.fullmatch(PARTITION_NAME, shape.gpu_type, re.ASCII):
                lines.append(f"    gpu_type: {scalar(shape.gpu_type)}")
            vendor = next(
                (maker for maker, pattern in _VENDORS if pattern.match(shape.gpu_type)), ""
            )
            lines.append(
                f"    gpu_vendor: {vendor} # {_TODO}, by its name"
                if vendor
                else f"    # gpu_vendor: nvidia # {_TODO}"
            )
            lines.append(f"    # gpu_memory_gib: 80 # {_TODO}")
        lines.append(
            "    tmp: {path: /tmp, kind: disk} # " + _TODO + ": ram where nodes have no disk"
        )
    return lines


def _partitions(
    usable: Sequence[PartitionFacts],
    shapes: Mapping[str, Counter[NodeShape]],
    kinds: Mapping[NodeShape, str],
) -> list[str]:
    if not usable:
        return [
            f"# partitions: none were shown, so any is accepted; {_TODO}",
            f"default_node_type: {scalar(next(iter(kinds.values())))}",
        ]
    lines = ["partitions:"]
    for partition in usable:
        counted = shapes[partition.name]
        main = (
            max(counted, key=lambda shape: (counted[shape], kinds[shape]))
            if counted
            else next(iter(kinds))
        )
        lines.append(f"  {scalar(partition.name)}:")
        others = sorted(
            f"{kinds[shape]} ({count})" for shape, count in counted.items() if shape != main
        )
        if others:
            lines += comment(f"{_TODO}: most nodes are of this kind; also {', '.join(others)}", 4)
        if not counted:
            lines += comment(f"{_TODO}: none of its nodes was shown", 4)
        lines.append(f"    node_type: {scalar(kinds[main])}")
        for remark in partition.remarks:
            lines += comment(remark, 4)
        if partition.whole_nodes:
            lines.append("    whole_nodes: true # OverSubscribe=EXCLUSIVE")
        if is_debug(partition.name):
            lines.append(f"    debug: true # {_TODO}, by its name")
        if partition.required_qos and re.fullmatch(
            PARTITION_NAME, partition.required_qos, re.ASCII
        ):
            lines.append(f"    qos: {scalar(partition.required_qos)} # AllowQos; {_TODO}")
        if partition.max_time_s:
            lines.append(f'    max_time: "{format_time(partition.max_time_s)}"')
        else:
            lines.append(f"    # max_time: no limit seen; {_TODO}")
        if partition.max_nodes:
            lines.append(f"    max_nodes: {partition.max_nodes}")
        if (partition.min_nodes or 1) > 1:
            lines.append(f"    min_nodes: {partition.min_nodes}")
        if partition.qos_of_partition:
            lines += comment(
                f"{_TODO}: QOS `{partition.qos_of_partition}` may limit nodes and jobs"
                f" (max_submitted, max_running): `sacctmgr show qos {partition.qos_of_partition}`",
                4,
            )
        lines.append(f"    # billing: {{unit: node-hour, per_node_hour: 1}} # {_TODO}")
    return lines


def is_debug(name: str) -> bool:
    """Whether a partition's name says that it is for tests."""
    return bool(_DEBUG.search(name))


def _rest(
    usable: Sequence[PartitionFacts],
    shapes: Mapping[str, Counter[NodeShape]],
    kinds: Mapping[NodeShape, str],
) -> list[str]:
    cpu_only = [
        p.name for p in usable if shapes[p.name] and not any(s.num_gpus for s in shapes[p.name])
    ]
    tools = []
    plain = [name for name in cpu_only if not is_debug(name)]
    if plain:
        tools.append(f"  cpu_partition: {scalar(plain[0])} # {_TODO}: for tokenizing and merging")
    debug = [p.name for p in usable if is_debug(p.name)]
    gpu_debug = [name for name in debug if name not in cpu_only]
    if debug:
        tools.append(
            f"  debug_partition: {scalar((gpu_debug or debug)[0])} # {_TODO}: for `hpctrain shell`"
        )
    return [
        "",
        f"# {_TODO}: singularity, apptainer or none, and the paths bound into containers",
        "container:",
        "  runtime: none",
        "# modules: {purge: true, load: []}",
        "# login: {host: login.example.org}",
        *(["tools:", *tools] if tools else []),
    ]
