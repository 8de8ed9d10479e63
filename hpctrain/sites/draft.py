"""A first site profile from what Slurm says of itself: every value to be checked by a person, none
of them verified."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import IO

from hpctrain.base.errors import EnvironmentFault, Problem, UsageError
from hpctrain.base.paths import filled
from hpctrain.base.units import format_time
from hpctrain.config.document import parse_yaml
from hpctrain.config.site import NAME, PARTITION_NAME, site_from_document
from hpctrain.config.text import comment, scalar
from hpctrain.slurm import commands as slurm
from hpctrain.slurm.facts import Facts, NodeShape, PartitionFacts, read_facts

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
    kinds, config = _kind_names(all_shapes), facts.config
    cluster = config.get("ClusterName", "")
    cpu_only = [
        name
        for name, counted in shapes.items()
        if counted and not any(shape.num_gpus for shape in counted)
    ]
    debug = sorted(filter(is_debug, shapes), key=lambda name: name in cpu_only)
    return filled(
        "site",
        "profile.yaml",
        name=name,
        todo="TODO: check",
        config={"JobRequeue": "", **config},
        num_odd=len(facts.partitions) - len(usable),
        skipped=facts.skipped,
        cluster=cluster if cluster.isprintable() and len(cluster) <= 200 else "",
        version=_matching(r"[0-9A-Za-z.-]{1,30}", config.get("SLURM_VERSION")),
        max_array_size=_matching(r"[1-9]\d{0,8}", config.get("MaxArraySize")),
        has_gpus=any(shape.num_gpus for shape in all_shapes),
        has_threads=any(shape.threads_per_core > 1 for shape in all_shapes),
        kinds=kinds,
        counts=all_shapes,
        partitions=[(one, *_kinds_of(shapes[one.name], kinds)) for one in usable],
        cpu_partition=next((name for name in cpu_only if not is_debug(name)), ""),
        debug_partition=debug[0] if debug else "",
        comment=lambda text, indent=0: "\n".join(comment(text, indent)),
        is_debug=is_debug,
        is_word=lambda text: _matching(PARTITION_NAME, text),
        memory_gib=lambda shape: f"{int(shape.mem_mib / 1024 * 100) / 100:g}",
        scalar=scalar,
        time=format_time,
        vendor_of=_vendor_of,
    )


def is_debug(name: str) -> bool:
    """Whether a partition's name says that it is for tests."""
    return bool(_DEBUG.search(name))


def _matching(pattern: str, text: str | None) -> str:
    """The text where all of it is as the pattern says, else nothing."""
    return text if text and re.fullmatch(pattern, text, re.ASCII) else ""


def _vendor_of(gpu_type: str) -> str:
    return next((maker for maker, pattern in _VENDORS if pattern.match(gpu_type)), "")


def _kinds_of(
    counted: Counter[NodeShape], kinds: Mapping[NodeShape, str]
) -> tuple[str, list[str] | None]:
    """The kind of most of a partition's nodes, and the others with their numbers; the first kind of
    all and None where none of its nodes was shown."""
    if not counted:
        return next(iter(kinds.values())), None
    main = max(counted, key=lambda shape: (counted[shape], kinds[shape]))
    others = [f"{kinds[shape]} ({count})" for shape, count in counted.items() if shape != main]
    return kinds[main], sorted(others)


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
