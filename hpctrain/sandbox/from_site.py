"""A site profile becomes the shape of a sandbox: same partitions, limits and kinds of node, as many
nodes as asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from hpctrain.base.errors import Problem, UsageError
from hpctrain.base.units import format_time
from hpctrain.config.site import NodeType, Partition, Site
from hpctrain.sandbox.shape import ClusterShape, NodeGroup, NodeShape, PartitionShape

OTHER_NODES = 2  # nodes of each kind that nobody asked for, so that its partitions exist


def shape_from_site(
    site: Site,
    num_nodes: int | Mapping[str, int],
    *,
    accounting: bool = False,
    accounts: Sequence[str] = (),
    partitions: Sequence[str] = (),
    mounts: Sequence[tuple[str, str]] = (),
    kill_wait_s: int = 30,
    slurmd_timeout_s: int = 120,
    lean: bool = False,
    runs_nodes: bool = True,
) -> ClusterShape:
    """The shape of `site` with `num_nodes` nodes of its main kind (that of its first partition), or
    by kind of node.

    Kinds of node that are not named get up to `OTHER_NODES`, so that every partition of the site is
    there; a kind given 0 leaves its partitions out. `partitions` names the ones of a site that
    lists none. Raises UsageError for an unknown kind of node, and when no node is left.
    """
    found = [site.partitions[name] for name in site.partitions]
    if not found:
        found = [
            part
            for name in partitions or ("main",)
            for part in [site.partition(name)]
            if part is not None
        ]
    main = found[0].node_type.name
    counts = dict(num_nodes) if isinstance(num_nodes, Mapping) else {main: num_nodes}
    problems = [
        Problem(
            f"site `{site.name}` has no node type `{name}`",
            hint=f"it has {', '.join(site.node_types)}",
        )
        for name in counts
        if name not in site.node_types
    ]
    used = list(dict.fromkeys(part.node_type.name for part in found))
    default = min(OTHER_NODES, max(counts.values(), default=1))
    groups, first = [], 1
    for name in used:
        count = counts.get(name, default)
        if count < 0:
            problems.append(Problem(f"`{count}` nodes of type `{name}`: not a number of nodes"))
        if count > 0:
            groups.append(NodeGroup(name, node_shape(site.node_types[name]), count, first=first))
            first += count
    kept = {group.type_name for group in groups}
    parts = [part for part in found if part.node_type.name in kept]
    if not parts and not problems:
        problems.append(Problem("a sandbox needs at least one node", hint="--nodes 4"))
    if problems:
        raise UsageError(problems)
    slurm = site.values["slurm"]
    suffix = site.values["network"]["rendezvous_suffix"]
    return ClusterShape(
        name=site.name,
        groups=tuple(groups),
        partitions=_partitions(parts),
        accounting=accounting,
        accounts=tuple(dict.fromkeys(accounts)),
        qos=tuple(sorted({_qos(part) for part in parts if part.qos})),
        max_array_size=slurm["max_array_size"],
        kill_wait_s=kill_wait_s,
        slurmd_timeout_s=slurmd_timeout_s,
        requeue=slurm["requeue"],
        one_thread_per_core=slurm["hint"] == "nomultithread",
        account_required=site.values["account"]["required"],
        mounts=tuple(mounts),
        node_dirs=_node_dirs(site, {group.type_name for group in groups}),
        host_suffixes=(suffix,) if suffix else (),
        lean=lean,
        runs_nodes=runs_nodes,
    )


def _partitions(parts: Sequence[Partition]) -> tuple[PartitionShape, ...]:
    """Slurm's partitions; of one that several queues share, what the most generous of them allows:
    their own limits are their QOS's."""
    shared: dict[str, list[Partition]] = {}
    for part in parts:
        shared.setdefault(part.slurm_name, []).append(part)

    def most(queues: list[Partition], name: str) -> int | None:
        limits = [getattr(queue, name) for queue in queues]
        return None if None in limits else max(limits)

    return tuple(
        PartitionShape(
            name=name,
            node_types=tuple(dict.fromkeys(queue.node_type.name for queue in queues)),
            max_time_s=most(queues, "max_time_s"),
            max_nodes=most(queues, "max_nodes"),
            min_nodes=None if len(queues) > 1 else queues[0].min_nodes,
            whole_nodes=all(queue.whole_nodes for queue in queues),
            max_submit=most(queues, "max_submitted"),
            max_running=most(queues, "max_running"),
            is_default=index == 0,
        )
        for index, (name, queues) in enumerate(shared.items())
    )


def _qos(queue: Partition) -> str:
    """The QOS of a queue, with its limits as `sacctmgr add qos` takes them."""
    limits = {
        "MaxWall": queue.max_time_s and format_time(queue.max_time_s),
        "MaxTRES=node": queue.max_nodes,
        "MinTRES=node": queue.min_nodes,
        "MaxSubmitJobsPerUser": queue.max_submitted,
        "MaxJobsPerUser": queue.max_running,
    }
    words = [f"{name}={value}" for name, value in limits.items() if value and queue.partition]
    return " ".join([str(queue.qos), *words])


def _node_dirs(site: Site, node_types: Set[str]) -> tuple[str, ...]:
    """The folders that a job of this site makes on its nodes for itself alone."""
    patterns = [
        fields["path"] for fields in site.values["node_dirs"].values() if "{job}" in fields["path"]
    ]
    places = [site.node_types[name].tmp_path for name in sorted(node_types)]
    return tuple(
        dict.fromkeys(pattern.replace("{tmp}", tmp) for tmp in places for pattern in patterns)
    )


def node_shape(kind: NodeType) -> NodeShape:
    """A kind of node as Slurm shall see it; the cores that jobs may not use are the first of equal
    groups.

    On LUMI-G 8 of 64 cores are reserved: core 0 of each group of 8, the ones its published CPU
    masks leave out.
    """
    reserved = kind.cores - kind.usable_cores
    sockets = kind.sockets if kind.cores % kind.sockets == 0 else 1
    return NodeShape(
        sockets=sockets,
        cores_per_socket=kind.cores // sockets,
        threads_per_core=kind.threads_per_core,
        mem_gib=kind.memory_gib,
        gpus=kind.gpus,
        gpu_type=kind.gpu_type,
        gpu_vendor=kind.gpu_vendor,
        reserved_cores=tuple(kind.cores * index // reserved for index in range(reserved)),
    )
