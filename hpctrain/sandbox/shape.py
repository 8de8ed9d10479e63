"""The shape of a simulated cluster, and the Slurm configuration files that give a real Slurm that
shape.

Pure: the same shape and place give the same text, by templates/sandbox/*.jinja.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hpctrain.base import units
from hpctrain.base.errors import Problem, UsageError
from hpctrain.base.paths import filled

# The site's rules that slurm.conf cannot express. A job that says nothing about hardware threads
# gets one per core; `--hint=multithread` is visible only in its environment (sbatch),
# `--threads-per-core` in the request itself.
_JOB_SUBMIT = """\
function slurm_job_submit(job, partitions, uid)
@RULES@
  return slurm.SUCCESS
end

function slurm_job_modify(job, record, partitions, uid)
  return slurm.SUCCESS
end
"""
_ONE_THREAD = """\
  local asked = job.environment and job.environment["SLURM_HINT"]
  if job.threads_per_core == slurm.NO_VAL16 and asked ~= "multithread" then
    job.threads_per_core = 1
  end"""
# 2050 is ESLURM_ACCOUNTING_POLICY: LUMI answers a job without an account as one over its limit.
_ACCOUNT_REQUIRED = """\
  if job.account == nil or job.account == "" then
    slurm.log_user("AssocMaxSubmitJobLimit")
    return 2050
  end"""
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}\Z")
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9_./+@=~-]*\Z")
MAX_NODES = 4096


@dataclass(frozen=True)
class NodeShape:
    """What Slurm believes a node of one type to be. `reserved_cores` are closed to jobs (LUMI: core
    0 of each CCD)."""

    sockets: int = 1
    cores_per_socket: int = 1
    threads_per_core: int = 1
    mem_gib: float = 1.0
    gpus: int = 0
    gpu_type: str = ""
    gpu_vendor: str = ""
    reserved_cores: tuple[int, ...] = ()

    @property
    def cores(self) -> int:
        return self.sockets * self.cores_per_socket

    @property
    def usable_cores(self) -> int:
        return self.cores - len(self.reserved_cores)


@dataclass(frozen=True)
class NodeGroup:
    """`num_nodes` nodes of one type, named prefix + number with leading zeros, as the site names
    them."""

    type_name: str
    node: NodeShape
    num_nodes: int
    prefix: str = "nid"
    first: int = 1
    digits: int = 6

    @property
    def names(self) -> list[str]:
        return [
            f"{self.prefix}{number:0{self.digits}d}"
            for number in range(self.first, self.first + self.num_nodes)
        ]


@dataclass(frozen=True)
class PartitionShape:
    """A partition and its limits; None is no limit. `max_submit` and `max_running` (per user) need
    accounting."""

    name: str
    node_types: tuple[str, ...]
    max_time_s: int | None = None
    default_time_s: int | None = None
    max_nodes: int | None = None
    min_nodes: int | None = None
    whole_nodes: bool = False
    max_submit: int | None = None
    max_running: int | None = None
    is_default: bool = False

    @property
    def qos(self) -> str:
        """The QOS that carries this partition's per-user limits, "" when it has none."""
        return (
            f"part-{self.name}"
            if self.max_submit is not None or self.max_running is not None
            else ""
        )


@dataclass(frozen=True)
class ClusterShape:
    """A whole simulated cluster. Two shapes are the same cluster exactly when they are equal."""

    name: str
    groups: tuple[NodeGroup, ...]
    partitions: tuple[PartitionShape, ...]
    accounting: bool = False
    accounts: tuple[str, ...] = ()
    qos: tuple[str, ...] = ()
    max_array_size: int = 1001
    kill_wait_s: int = 30
    slurmd_timeout_s: int = 120
    requeue: bool = True
    one_thread_per_core: bool = False  # jobs that say nothing get --hint=nomultithread, as on LUMI
    account_required: bool = False  # with accounting: a job without --account is refused
    # (directory of this machine, the site's path it stands at)
    mounts: tuple[tuple[str, str], ...] = ()
    # what every job makes on its nodes for itself, with {user} and {job}
    node_dirs: tuple[str, ...] = ()
    host_suffixes: tuple[str, ...] = ()  # node names also resolve with these added (JSC's `i`)
    # False: only the controller, which knows all nodes, accepts and refuses jobs, and starts none
    runs_nodes: bool = True
    # for thousands of tasks: tasks are known by process group, their memory is not measured
    lean: bool = False

    @property
    def node_names(self) -> list[str]:
        return [name for group in self.groups for name in group.names]

    @property
    def num_nodes(self) -> int:
        return sum(group.num_nodes for group in self.groups)

    def as_json(self) -> dict[str, Any]:
        """Plain data; `from_json` gives an equal shape back."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ClusterShape:
        """The shape of `as_json`. Raises UsageError when the data is of another version of
        hpctrain."""
        try:
            groups = tuple(
                NodeGroup(**{**group, "node": NodeShape(**_tuples(group["node"]))})
                for group in data["groups"]
            )
            partitions = tuple(
                PartitionShape(**_tuples(partition)) for partition in data["partitions"]
            )
            mounts = tuple((source, target) for source, target in data.get("mounts", ()))
            return ClusterShape(
                **{**_tuples(data), "groups": groups, "partitions": partitions, "mounts": mounts}
            )
        except (KeyError, TypeError) as error:
            raise UsageError(f"not the shape of a sandbox: {error}") from error


@dataclass(frozen=True)
class Ports:
    """TCP ports of one sandbox: the controller's, the accounting daemon's, and one per node from
    `slurmd_first`."""

    slurmctld: int
    slurmdbd: int
    slurmd_first: int


@dataclass(frozen=True)
class Place:
    """Where on this machine a shape is built. `state` keeps, `run` holds sockets (a short path: 108
    bytes at most)."""

    state: str
    run: str
    user: str
    ports: Ports
    plugin_dir: str = ""
    first_job_id: int = 1
    has_lua: bool = False
    has_views: bool = False  # each node has namespaces of its own


def check(shape: ClusterShape) -> None:
    """Raise UsageError naming everything in a shape that Slurm could not be given."""
    problems: list[Problem] = []
    words = [("cluster name", shape.name), *(("account", name) for name in shape.accounts)]
    words += [("partition", partition.name) for partition in shape.partitions]
    words += [("node type", group.type_name) for group in shape.groups]
    words += [("GPU type", group.node.gpu_type) for group in shape.groups if group.node.gpu_type]
    words += [("node name prefix", group.prefix) for group in shape.groups] + [
        ("qos", words.split()[0]) for words in shape.qos
    ]
    problems += [
        Problem(
            f"{what} `{word}` has a character that Slurm's configuration does not take",
            hint="letters, digits, _ . @ -",
        )
        for what, word in words
        if not _WORD.match(word)
    ]
    if not 1 <= shape.num_nodes <= MAX_NODES or any(group.num_nodes < 1 for group in shape.groups):
        problems.append(Problem(f"a sandbox has 1 to {MAX_NODES} nodes, not {shape.num_nodes}"))
    if not shape.partitions:
        problems.append(Problem("a sandbox needs at least one partition"))
    types = {group.type_name for group in shape.groups}
    for partition in shape.partitions:
        unknown = sorted(set(partition.node_types) - types)
        if unknown or not partition.node_types:
            problems.append(
                Problem(
                    f"partition `{partition.name}` is on unknown nodes"
                    f" {', '.join(unknown) or '(none)'}"
                )
            )
    for group in shape.groups:
        node = group.node
        if (
            min(node.sockets, node.cores_per_socket, node.threads_per_core) < 1
            or node.mem_gib <= 0
            or node.gpus < 0
        ):
            problems.append(
                Problem(
                    f"node type `{group.type_name}` has no cores, no memory or a negative number of"
                    " GPUs"
                )
            )
        elif node.usable_cores < 1 or any(
            not 0 <= core < node.cores for core in node.reserved_cores
        ):
            problems.append(
                Problem(
                    f"node type `{group.type_name}` reserves cores it does not have, or all of them"
                )
            )
    problems += [
        Problem(
            f"`{source}:{target}` is not a mount",
            hint="two absolute paths, the second below / but not / itself",
        )
        for source, target in shape.mounts
        if not (
            source.startswith("/")
            and target.startswith("/")
            and target.strip("/")
            and ".." not in target.split("/")
        )
    ]
    if len(set(shape.node_names)) != shape.num_nodes:
        problems.append(Problem("two node groups have nodes of the same name"))
    if problems:
        raise UsageError(problems)


def check_path(path: str, what: str) -> None:
    """Refuse a path that cannot stand in slurm.conf (`#`, `%`, blanks, quotes and commas have
    meanings there)."""
    if not _PLAIN_PATH.match(path):
        raise UsageError(
            f"{what} `{path}` has a character that cannot stand in slurm.conf",
            hint="give another one: --dir /plain/path",
        )


def config_files(shape: ClusterShape, place: Place) -> dict[str, str]:
    """`{file name: text}` of slurm.conf, gres.conf, hosts, job_submit.lua and, with accounting,
    slurmdbd.conf."""
    check(shape)
    files = {
        "slurm.conf": _slurm_conf(shape, place),
        "gres.conf": filled(
            "sandbox", "gres.conf", shape=shape, state=place.state, compressed=_compressed
        ),
        "hosts": hosts(shape),
    }
    if place.has_lua and _rules(shape):
        files["job_submit.lua"] = _JOB_SUBMIT.replace("@RULES@", "\n".join(_rules(shape)))
    if shape.accounting:
        files["slurmdbd.conf"] = filled("sandbox", "slurmdbd.conf", place=place)
    return files


def accounting_commands(shape: ClusterShape, user: str) -> list[list[str]]:
    """`sacctmgr -i` arguments that make the cluster, its accounts, and the QOS of each partition
    with its limits."""
    commands = [["add", "cluster", shape.name]]
    names = ["normal"]
    for partition in shape.partitions:
        if partition.qos:
            limits = []
            if partition.max_submit is not None:
                limits.append(f"MaxSubmitJobsPerUser={partition.max_submit}")
            if partition.max_running is not None:
                limits.append(f"MaxJobsPerUser={partition.max_running}")
            commands.append(["add", "qos", partition.qos, *limits, "Flags=DenyOnLimit"])
    for name, *limits in map(str.split, shape.qos):
        flags = ["Flags=DenyOnLimit"] if limits else []
        if name != "normal":
            commands.append(["add", "qos", name, *limits, *flags])
            names.append(name)
        elif limits:  # it is there from the beginning
            commands.append(["modify", "qos", name, "set", *limits, *flags])
    accounts = shape.accounts or ("sandbox",)
    commands.append(
        ["add", "account", ",".join(accounts), f"Cluster={shape.name}", f"QOS={','.join(names)}"]
    )
    # No default account on purpose would need no user at all; Slurm wants one, the first listed.
    commands.append(
        ["add", "user", user, f"Account={','.join(accounts)}", f"DefaultAccount={accounts[0]}"]
    )
    return commands


def hosts(shape: ClusterShape, at_most: int | None = None) -> str:
    """An /etc/hosts text for jobs: every simulated node has a loopback address of its own,
    127.A.B.C."""
    lines = ["127.0.0.1 localhost"]
    for index, name in enumerate(shape.node_names[:at_most], start=1):
        names = [name, *(name + suffix for suffix in shape.host_suffixes)]
        lines.append(f"127.77.{index // 256}.{index % 256} {' '.join(names)}")
    return "\n".join(lines) + "\n"


def reserved_cpu_ids(node: NodeShape) -> list[int]:
    """Slurm's abstract CPU numbers of the reserved cores: socket by socket, core by core, thread by
    thread."""
    threads = node.threads_per_core
    return [
        core * threads + thread
        for core in sorted(set(node.reserved_cores))
        for thread in range(threads)
    ]


def _rules(shape: ClusterShape) -> list[str]:
    rules = []
    if shape.one_thread_per_core and any(group.node.threads_per_core > 1 for group in shape.groups):
        rules.append(_ONE_THREAD)
    if shape.account_required and shape.accounting:
        rules.append(_ACCOUNT_REQUIRED)
    return rules


def _slurm_conf(shape: ClusterShape, place: Place) -> str:
    ports, first = {}, place.ports.slurmd_first
    for group in shape.groups:
        last = first + group.num_nodes - 1
        ports[group] = f"{first}" if last == first else f"[{first}-{last}]"
        first = last + 1

    def groups_of(partition: PartitionShape) -> list[NodeGroup]:
        return [group for group in shape.groups if group.type_name in partition.node_types]

    def mem_per_cpu(partition: PartitionShape) -> int:
        nodes = [group.node for group in groups_of(partition)]
        cpus = [node.usable_cores * node.threads_per_core for node in nodes]
        return max(1, *(int(node.mem_gib * 1024) // count for node, count in zip(nodes, cpus)))

    return filled(
        "sandbox",
        "slurm.conf",
        shape=shape,
        place=place,
        has_rules=place.has_lua and bool(_rules(shape)),
        has_gpus=any(group.node.gpus for group in shape.groups),
        ports=ports,
        groups_of=groups_of,
        mem_per_cpu=mem_per_cpu,
        reserved_cpu_ids=reserved_cpu_ids,
        compressed=_compressed,
        time=units.format_time,
    )


def _compressed(*groups: NodeGroup) -> str:
    return units.compress_nodes([name for group in groups for name in group.names])


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
