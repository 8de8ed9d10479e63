"""Where a run goes and with what shape: partition, GPUs, tasks, cpus and memory of a node. Pure."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from hpctrain.base.units import format_time, parse_mem_gib
from hpctrain.config.fields import nearest
from hpctrain.config.site import NodeType, Partition
from hpctrain.plan.notes import Notes


def pick_partition(notes: Notes) -> tuple[Partition, NodeType]:
    spec, site = notes.spec, notes.site
    if spec.partition:
        found = _named_partition(notes, spec.partition)
        notes.decide("partition", found.name, "as the run says", "partition")
        return found, found.node_type
    fitting = fitting_partitions(notes)
    if not fitting:
        if not site.partitions:
            default = site.partition("")
            assert default
            notes.decide(
                "partition",
                "",
                "the site's default partition, since neither the run nor the profile names one",
            )
            return default, default.node_type
        _none_fits(notes)
        return Partition("", _any_node(notes)), _any_node(notes)
    found = fitting[0]
    others = f"; {', '.join(p.name for p in fitting[1:])} would fit too" if len(fitting) > 1 else ""
    reason = f"the smallest that fits {spec.num_nodes} nodes for {format_time(spec.time_s)}{others}"
    notes.decide("partition", found.name, reason, "partitions", found.name, site=True)
    return found, found.node_type


def _named_partition(notes: Notes, names: str) -> Partition:
    """The partition that the run names; of several, Slurm takes the one that starts it first, and
    the plan holds to the smallest of their limits."""
    site, found = notes.site, []
    for name in names.split(","):
        one = site.partition(name)
        if not one:
            notes.error(
                f"site `{site.name}` has no partition `{name}`",
                "partition",
                why=f"partitions are set in {site.document.where('partitions')}",
                hint=nearest(name, site.partitions),
            )
        found.append(one or Partition(name, _any_node(notes)))
    if len({one.node_type.name for one in found}) > 1:
        kinds = ", ".join(f"{one.name}: {one.node_type.name}" for one in found)
        notes.error(
            f"the partitions of `partition: {names}` have unlike nodes ({kinds})",
            "partition",
            hint="name those of one kind: tasks and cores are counted for it",
        )
    nodes, times = notes.spec.num_nodes, notes.spec.time_s
    tightest = min(
        found, key=lambda one: (one.max_nodes or nodes, one.time_limit_s(nodes) or times)
    )
    together = ",".join(one.slurm_name for one in found)
    return replace(tightest, partition=together) if len(found) > 1 else tightest


def _none_fits(notes: Notes) -> None:
    spec, wants = notes.spec, _wants_gpus(notes)
    lines, only_kind = [], False
    for partition in notes.site.partitions.values():
        misfits = _misfits(notes, partition, wants)
        lines.append(f"{limit_line(notes, partition)}: {'; '.join(misfits)}")
        only_kind = only_kind or misfits == _kind_misfit(partition, wants)
    smaller = "ask for fewer nodes or less time, or name a `partition:`"
    asked = "name a `partition:`, or say with `gpus_per_node:` how many GPUs it takes"
    notes.error(
        f"no partition of `{notes.site.name}` fits {spec.num_nodes} nodes for"
        f" {format_time(spec.time_s)}",
        "nodes",
        why="\n".join(lines),
        hint=asked if only_kind else smaller,
    )


def fitting_partitions(notes: Notes, like: Partition | None = None) -> list[Partition]:
    """The partitions that the run fits into, of the kind of nodes that it needs, or that `like`
    has; the best first."""
    wants = bool(like.node_type.gpus) if like else _wants_gpus(notes)
    found = [p for p in notes.site.partitions.values() if not _misfits(notes, p, wants)]
    # Those that are nobody's special ones; shorter partitions drain faster; among equals the one
    # made for small jobs.
    return sorted(found, key=lambda p: (p.max_nodes or 10**9, p.max_time_s or 10**9, p.name))


def _wants_gpus(notes: Notes) -> bool | None:
    """Whether the run goes to nodes with GPUs; None where the site has one kind of nodes for it."""
    kinds = {bool(p.node_type.gpus) for p in notes.site.partitions.values() if not p.debug}
    return (
        notes.recipe.values["needs_gpus"] or bool(notes.spec.gpus_per_node)
        if len(kinds) > 1
        else None
    )


def _misfits(notes: Notes, partition: Partition, wants_gpus: bool | None) -> list[str]:
    """Why the run does not go there by itself; empty where it does."""
    spec, found = notes.spec, _kind_misfit(partition, wants_gpus)
    if partition.debug:
        found.append("it is for tests")
    if partition.special:
        found.append(partition.special)
    if spec.num_nodes > (partition.max_nodes or spec.num_nodes):
        found.append(f"{spec.num_nodes} nodes are too many")
    if spec.num_nodes < (partition.min_nodes or 1):
        found.append(f"{spec.num_nodes} nodes are too few, it takes {partition.min_nodes} or more")
    if spec.time_s > (partition.time_limit_s(spec.num_nodes) or spec.time_s):
        found.append(f"{format_time(spec.time_s)} is too long")
    return found


def _kind_misfit(partition: Partition, wants_gpus: bool | None) -> list[str]:
    if wants_gpus is None or bool(partition.node_type.gpus) == wants_gpus:
        return []
    return ["it has no GPUs" if wants_gpus else "it has GPUs, and the run asks for none"]


def limit_line(notes: Notes, partition: Partition) -> str:
    limit_s = partition.time_limit_s(notes.spec.num_nodes)
    time = format_time(limit_s) if limit_s else "any time"
    nodes = f"{partition.max_nodes} nodes" if partition.max_nodes else "any number of nodes"
    kind = f"{partition.node_type.gpus} GPUs a node" if partition.node_type.gpus else "CPU only"
    return f"{partition.name}: up to {nodes}, {time}, {kind}{', debug' if partition.debug else ''}"


def decide_shape(notes: Notes, node: NodeType) -> tuple[int, int, int]:
    spec = notes.spec
    gpus = node.gpus if spec.gpus_per_node is None else spec.gpus_per_node
    asked = _asked_gpus(notes)
    if asked is not None:
        gpus = asked
    if notes.site.values["slurm"]["gpu_request"] == "none" and spec.gpus_per_node is None:
        gpus = 0
    if gpus > node.gpus:
        notes.error(
            f"`gpus_per_node: {gpus}` is more than a `{node.name}` node has ({node.gpus})",
            "gpus_per_node",
            why=f"set in {notes.site.document.where('node_types', node.name, 'gpus')}",
        )
        gpus = node.gpus
    if asked is not None and spec.gpus_per_node is None:
        notes.decide("gpus_per_node", gpus, "as `sbatch:` says", "sbatch")
    elif spec.gpus_per_node is None:
        notes.decide(
            "gpus_per_node",
            gpus,
            f"all of a `{node.name}` node",
            "node_types",
            node.name,
            "gpus",
            site=True,
        )
    else:
        notes.decide("gpus_per_node", gpus, "as the run says", "gpus_per_node")
    tasks = _tasks(notes, node, gpus)
    cpus = _cpus(notes, node, gpus, tasks)
    if tasks * cpus > node.usable_cores:
        where = (
            node.name,
            (
                "usable_cores"
                if ("node_types", node.name, "usable_cores") in notes.site.document.origins
                else "cores"
            ),
        )
        key = ("sbatch", "cpus-per-task") if "cpus-per-task" in spec.sbatch else ("tasks_per_node",)
        notes.error(
            f"{tasks} tasks x {cpus} cpus = {tasks * cpus} cores a node, and a `{node.name}` node"
            f" has {node.usable_cores} usable ones",
            *key,
            why=f"set in {notes.site.document.where('node_types', *where)}"
            + (
                f" ({node.cores - node.usable_cores} of {node.cores} cores are reserved)"
                if node.usable_cores < node.cores
                else ""
            ),
            hint=(
                f"at most `cpus-per-task: {max(node.usable_cores // tasks, 1)}` with {tasks} tasks"
                " a node"
            ),
        )
    return gpus, tasks, cpus


def _asked_gpus(notes: Notes) -> int | None:
    """GPUs a node as an `sbatch:` option says, None where none does."""
    for option, pattern in (
        ("gres", r"(?:^|.*,)gpu(?::[A-Za-z][\w.-]*)?:(\d+)(?:,.*|$)"),
        ("gpus-per-node", r"(?:[A-Za-z][\w.-]*:)?(\d+)$"),
    ):
        found = re.match(pattern, str(notes.spec.sbatch.get(option, "")))
        if not found:
            continue
        count = int(found[1])
        if notes.spec.gpus_per_node not in (None, count):
            notes.error(
                f"`sbatch.{option}` asks for {count} GPUs a node, and `gpus_per_node:` for"
                f" {notes.spec.gpus_per_node}",
                "sbatch",
                option,
                hint="delete one of them",
            )
        return count
    return None


def wants_whole_nodes(notes: Notes, partition: Partition, node: NodeType, gpus: int) -> bool:
    asked = notes.spec.sbatch.get(
        "exclusive", notes.site.values["slurm"]["always"].get("exclusive")
    )
    if asked is not None:
        return asked not in (False, "false")
    return bool(node.gpus) and gpus == node.gpus and not partition.whole_nodes


def decide_memory_gib(notes: Notes, node: NodeType, gpus: int, cores: int, whole: bool) -> float:
    share = 1.0
    if not whole:
        share = gpus / node.gpus if gpus and node.gpus else min(cores / node.usable_cores, 1.0)
    text = notes.spec.sbatch.get("mem")
    if text not in (None, False) and str(text) != "0":
        try:
            asked = parse_mem_gib(text)
        except ValueError as error:
            notes.error(f"`sbatch.mem`: {error}", "sbatch", "mem")
            return node.memory_gib
        if asked > node.memory_gib:
            notes.error(
                f"`mem: {text}` is more than a `{node.name}` node gives ({node.memory_gib:g} GiB)",
                "sbatch",
                "mem",
                why=f"set in {notes.site.document.where('node_types', node.name, 'memory_gib')}",
            )
        return asked
    return (
        node.memory_gib
        if whole or str(text) == "0"
        else max(round(node.memory_gib * share, 3), 0.01)
    )


def _any_node(notes: Notes) -> NodeType:
    nodes = list(notes.site.node_types.values())
    return next(
        (node for node in nodes if node.gpus and notes.recipe.values["needs_gpus"]), nodes[0]
    )


def _tasks(notes: Notes, node: NodeType, gpus: int) -> int:
    spec, mode = notes.spec, notes.recipe.tasks
    if mode == "by_launch":
        launch = spec.recipe_options.get("launch") or notes.recipe.options["launch"].default
        mode = "free" if launch == "srun" else "per_node"
    override = spec.sbatch.get("ntasks-per-node")
    if override is not None and not _positive(override):
        notes.error(
            f"`ntasks-per-node: {override}` is not a number of tasks", "sbatch", "ntasks-per-node"
        )
        override = None
    wanted = spec.tasks_per_node or (int(override) if override else None)
    key = ("tasks_per_node",) if spec.tasks_per_node else ("sbatch", "ntasks-per-node")
    if mode == "per_node":
        if wanted and wanted != 1:
            notes.error(
                f"recipe `{notes.recipe.name}` starts one task a node, which starts the others",
                *key,
                hint="delete it",
            )
        notes.decide("tasks_per_node", 1, f"recipe `{notes.recipe.name}` has one launcher a node")
        return 1
    if mode == "per_gpu" and gpus and wanted and wanted != gpus:
        notes.error(
            f"{wanted} tasks a node with {gpus} GPUs: recipe `{notes.recipe.name}` needs one task"
            " per GPU",
            *key,
            hint=f"delete it, or set `gpus_per_node: {wanted}`",
        )
    if wanted:
        return int(notes.decide("tasks_per_node", wanted, "as the run says", *key))
    if gpus:
        return int(notes.decide("tasks_per_node", gpus, "one task per GPU"))
    tasks = node.tasks_per_node or 1
    return int(notes.decide("tasks_per_node", tasks, f"no GPUs; `{node.name}` nodes take {tasks}"))


def _cpus(notes: Notes, node: NodeType, gpus: int, tasks: int) -> int:
    override = notes.spec.sbatch.get("cpus-per-task")
    if override is not None:
        if not _positive(override):
            notes.error(
                f"`cpus-per-task: {override}` is not a number of cpus", "sbatch", "cpus-per-task"
            )
            return 1
        return int(
            notes.decide(
                "cpus_per_task", int(override), "as the run says", "sbatch", "cpus-per-task"
            )
        )
    share = node.usable_cores * gpus // node.gpus if gpus and node.gpus else node.usable_cores
    cpus = max(share // tasks, 1)
    return int(
        notes.decide(
            "cpus_per_task",
            cpus,
            f"{share} usable cores shared by {tasks} tasks",
            "node_types",
            node.name,
            "usable_cores",
            site=True,
        )
    )


def _positive(value: Any) -> bool:
    return not isinstance(value, bool) and str(value).isdigit() and int(value) > 0
