"""A site as data: frozen values from `site_profiles/<site>/profile.yaml`, layered, each value with
its origin.

Nothing is run and nothing is read from the environment's Slurm when a profile is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hpctrain.base.errors import Problem, UsageError
from hpctrain.base.paths import layer_dirs, shipped_dir
from hpctrain.config.document import Document, load_yaml, merge
from hpctrain.config.fields import Field, check, nearest
from hpctrain.config.trust import require_trust

_SHIPPED = "site_profiles" + os.sep  # how messages begin the name of a shipped profile
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
ENV_NAME = r"[A-Za-z_][A-Za-z0-9_]{0,127}"
_WORD = r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}"
PARTITION_NAME = _WORD
HOST = r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}"

_NODE_TYPE = {
    "sockets": Field("int", "CPU sockets", default=1, minimum=1),
    "cores": Field("int", "cores of the whole node", required=True, minimum=1, maximum=4096),
    "threads_per_core": Field("int", "hardware threads a core", default=1, minimum=1, maximum=8),
    "usable_cores": Field("int", "cores jobs may use (default: all)", minimum=1, maximum=4096),
    "memory_gib": Field("number", "memory jobs may use, in GiB", required=True, minimum=0.1),
    "numa_domains": Field("int", "NUMA domains", default=1, minimum=1),
    "gpus": Field("int", "GPUs as Slurm counts them", default=0, minimum=0, maximum=64),
    "gpu_type": Field(
        "text",
        "gres type of the GPUs, as in gpu:<type>:8",
        default="",
        pattern=f"({_WORD})?",
        shape="a word",
    ),
    "gpu_vendor": Field("text", "maker of the GPUs", choices=("amd", "nvidia", "intel")),
    "gpu_memory_gib": Field("number", "memory of one GPU, in GiB", minimum=0.1),
    "tasks_per_node": Field("int", "tasks a node when it has no GPUs", minimum=1, maximum=4096),
    "cpu_bind": Field(
        "map",
        "srun --cpu-bind value by cores per task, for whole nodes with one task per GPU",
        keys="[0-9]+",
        items=Field(
            "text",
            "as in srun --cpu-bind",
            pattern=r"[A-Za-z_]+(:[0-9a-fA-Fx,]+)?",
            shape="a value of --cpu-bind",
        ),
    ),
    "tmp": Field(
        "table",
        "the node's own temporary storage",
        fields={
            "path": Field("path", "where it is", default="/tmp"),
            "kind": Field(
                "text", "what it is made of", default="disk", choices=("ram", "disk", "nvme")
            ),
            "size_gib": Field("number", "its size, in GiB", minimum=0),
        },
    ),
}

_BILLING = {
    "unit": Field("text", "the unit the site counts", required=True),
    "per_node_hour": Field("number", "units for one node-hour of a whole node", minimum=0),
    "per_slice_hour": Field("number", "units for one slice-hour", minimum=0),
    "slice": Field(
        "table",
        "one slice; a job is billed for the largest of cores, memory and GPUs in slices,"
        " rounded up",
        fields={
            "cores": Field("number", "cores in a slice", minimum=0.01),
            "memory_gib": Field("number", "memory in a slice", minimum=0.01),
            "gpus": Field("number", "GPUs in a slice", minimum=0.01),
        },
    ),
}

_PARTITION = {
    "node_type": Field("text", "one of node_types", required=True),
    "whole_nodes": Field("bool", "nodes are given whole to one job", default=False),
    "debug": Field("bool", "for short tests; never chosen for a run by itself", default=False),
    "partition": Field(
        "text",
        "Slurm's name of it, where several entries (queues) share one partition",
        pattern=_WORD,
        shape="a partition",
    ),
    "qos": Field("text", "QOS that jobs here must name", pattern=_WORD, shape="a QOS"),
    "constraint": Field("text", "value of --constraint that jobs here must give"),
    "special": Field("text", "why no run is put here by itself, such as `on application`"),
    "max_time": Field("time", "longest wall time"),
    "max_time_by_nodes": Field(
        "map",
        "longest wall time of jobs of at least so many nodes",
        keys="[0-9]+",
        items=Field("time", "the limit"),
    ),
    "max_nodes": Field("int", "most nodes a job", minimum=1),
    "min_nodes": Field("int", "fewest nodes a job", minimum=1),
    "max_submitted": Field("int", "most jobs of a user, pending ones included", minimum=1),
    "max_running": Field("int", "most running jobs of a user", minimum=1),
    "billing": Field("table", "how the site counts", fields=_BILLING, nullable=True),
}

_ENV = {
    "value": Field("text", "the value", required=True),
    "from_nodes": Field(
        "map",
        "values for jobs of at least so many nodes",
        keys="[0-9]+",
        items=Field("text", "the value"),
    ),
    "why": Field("text", "the reason, printed beside it in the job script", required=True),
}

_STORAGE = {
    "path": Field("path", "where it is; {account} and {user} stand for the run's", required=True),
    "kind": Field("text", "file system"),
    "quota_gib": Field("number", "quota, in GiB", minimum=0),
    "max_files": Field("int", "inode quota", minimum=1),
    "holds": Field(
        "list",
        "what belongs here",
        items=Field("text", "", choices=("checkpoints", "data", "code")),
    ),
}

FIELDS: dict[str, Field] = {
    "name": Field(
        "text",
        "the profile's name, equal to its folder's",
        required=True,
        pattern=NAME,
        shape="a name",
    ),
    "extends": Field("text", "a profile to start from", pattern=NAME, shape="a name"),
    "title": Field("text", "what people call the machine", required=True),
    "docs_url": Field("text", "the site's documentation"),
    "maintainers": Field("list", "who to ask", items=Field("text", "a name or handle")),
    "verified": Field(
        "table",
        "when and how the facts were checked",
        fields={
            "date": Field("text", "day of the check", pattern=r"\d{4}-\d{2}-\d{2}", shape="a date"),
            "by": Field("text", "who or what checked"),
            "slurm": Field("text", "Slurm version seen"),
            "evidence": Field("text", "where it can be read"),
        },
    ),
    "match": Field(
        "table",
        "how to recognise the site",
        fields={
            "cluster_name": Field("text", "ClusterName of its Slurm"),
            "hostnames": Field(
                "list", "regular expressions of login host names", items=Field("text", "")
            ),
        },
    ),
    "account": Field(
        "table",
        "the Slurm account",
        fields={
            "required": Field("bool", "jobs without one are refused", default=False),
            "pattern": Field("text", "regular expression it must match", default=""),
            "example": Field("text", "an example for messages", default=""),
        },
    ),
    "slurm": Field(
        "table",
        "how this Slurm wants its jobs",
        fields={
            "gpu_request": Field(
                "text",
                "option that asks for GPUs",
                default="gres",
                choices=("gpus-per-node", "gres", "none"),
            ),
            "array_counts_as_jobs": Field(
                "bool", "array tasks count against max_submitted", default=False
            ),
            "max_array_size": Field(
                "int", "MaxArraySize (highest index + 1)", default=1001, minimum=1
            ),
            "requeue": Field("bool", "jobs go back to the queue when a node fails", default=True),
            "hint": Field("text", "value of --hint", pattern="[a-z_]+", shape="a hint"),
            "constraint": Field("text", "value of --constraint"),
            "mem": Field("bool", "jobs say how much memory they need", default=True),
            "always": Field(
                "map",
                "sbatch options every job gets",
                keys="[a-z][a-z0-9-]*",
                items=Field("scalar", "the value"),
            ),
            "srun": Field(
                "table",
                "options of every step",
                fields={
                    "kill_on_bad_exit": Field("bool", "a failed task ends the step", default=True),
                    "wait_s": Field(
                        "int",
                        "seconds until the rest is ended after the first task left",
                        default=60,
                        minimum=0,
                    ),
                    "extra": Field(
                        "list",
                        "more options",
                        items=Field("text", "one option", pattern="--.+", shape="an option"),
                    ),
                },
            ),
        },
    ),
    "node_types": Field(
        "map",
        "kinds of node",
        required=True,
        keys=NAME,
        items=Field("table", "a kind of node", fields=_NODE_TYPE),
    ),
    "default_node_type": Field("text", "kind of node of partitions that are not listed"),
    "partitions": Field(
        "map",
        "partitions; none listed: any is accepted",
        keys=_WORD,
        items=Field("table", "a partition", fields=_PARTITION),
    ),
    "modules": Field(
        "table",
        "environment modules of the job",
        fields={
            "purge": Field("bool", "start from none", default=False),
            "use": Field("list", "module paths", items=Field("path", "a path")),
            "load": Field("list", "modules", items=Field("text", "a module")),
            "why": Field("text", "the reason", default=""),
        },
    ),
    "env": Field(
        "map",
        "environment of the job",
        keys=ENV_NAME,
        items=Field("table", "a variable", fields=_ENV),
    ),
    "unset_env": Field(
        "list",
        "variables removed first",
        items=Field("text", "", pattern=ENV_NAME, shape="a variable name"),
    ),
    "node_dirs": Field(
        "map",
        "variables naming a folder that every task makes on its own node; {tmp} {user} {job} are"
        " filled in there",
        keys=ENV_NAME,
        items=Field(
            "table",
            "a folder",
            fields={
                "path": Field("path", "its path", required=True),
                "why": Field("text", "the reason", required=True),
            },
        ),
    ),
    "container": Field(
        "table",
        "how containers run",
        fields={
            "runtime": Field(
                "text", "the program", default="none", choices=("singularity", "apptainer", "none")
            ),
            "entry": Field(
                "text",
                "exec, or run where the image's entrypoint activates it",
                default="exec",
                choices=("exec", "run"),
            ),
            "gpu_flag": Field(
                "text", "for example --nv", default="", choices=("", "--nv", "--rocm")
            ),
            "binds": Field(
                "list",
                "paths bound into it",
                items=Field("path", "src[:dst[:opts]]", pattern=r"[^,]+", shape="one path"),
            ),
            "activate": Field("text", "shell line run inside first", default=""),
        },
    ),
    "network": Field(
        "table",
        "rendezvous of the ranks",
        fields={
            "rendezvous_suffix": Field(
                "text",
                "added to the first host's name",
                default="",
                pattern=r"[A-Za-z0-9.-]*",
                shape="part of a host name",
            ),
            "port_base": Field(
                "int", "lowest rendezvous port", default=20000, minimum=1024, maximum=65000
            ),
            "port_range": Field(
                "int", "how many ports from there", default=12768, minimum=1, maximum=60000
            ),
        },
    ),
    "storage": Field(
        "map", "file systems", keys=NAME, items=Field("table", "a file system", fields=_STORAGE)
    ),
    "login": Field(
        "table",
        "the login nodes",
        fields={"host": Field("text", "host name", pattern=HOST, shape="a host name")},
    ),
    "defaults": Field(
        "map", "run.yaml values for every run here", items=Field("any", "as in run.yaml")
    ),
    "tools": Field(
        "table",
        "where hpctrain's own jobs go",
        fields={
            "cpu_partition": Field("text", "for tokenizing and merging"),
            "debug_partition": Field("text", "for `hpctrain shell`"),
            "allocation": Field(
                "table",
                "tells what is left of a project",
                nullable=True,
                fields={
                    "command": Field(
                        "list", "the site's tool", required=True, items=Field("text", "")
                    ),
                    "patterns": Field(
                        "map",
                        "by billing unit: a regex with groups `used` and `granted`; {account} is"
                        " the project",
                        required=True,
                        items=Field("text", ""),
                    ),
                },
            ),
        },
    ),
}


@dataclass(frozen=True)
class NodeType:
    """A kind of node. `usable_cores` is what jobs may ask for; memory in GiB; `cpu_bind` by cores
    per task."""

    name: str
    sockets: int
    cores: int
    threads_per_core: int
    usable_cores: int
    memory_gib: float
    gpus: int
    gpu_type: str
    gpu_vendor: str
    gpu_memory_gib: float | None
    tasks_per_node: int | None
    cpu_bind: Mapping[int, str]
    tmp_path: str
    tmp_kind: str
    tmp_size_gib: float | None


@dataclass(frozen=True)
class Partition:
    """A partition and its limits; None where the site sets none or none is known."""

    name: str
    node_type: NodeType
    whole_nodes: bool = False
    debug: bool = False
    qos: str | None = None
    max_time_s: int | None = None
    max_nodes: int | None = None
    min_nodes: int | None = None
    max_submitted: int | None = None
    max_running: int | None = None
    billing: Mapping[str, Any] | None = None
    partition: str | None = None
    constraint: str | None = None
    special: str | None = None
    max_time_by_nodes: Mapping[int, int] = field(default_factory=dict)

    @property
    def slurm_name(self) -> str:
        """What Slurm calls the partition; `name` is the profile's."""
        return self.partition or self.name

    def time_limit_s(self, num_nodes: int) -> int | None:
        """The longest wall time of a job of so many nodes, in seconds; None where there is no
        limit."""
        bins = [
            time for least, time in sorted(self.max_time_by_nodes.items()) if num_nodes >= least
        ]
        return bins[-1] if bins else self.max_time_s


@dataclass(frozen=True)
class Site:
    """One site. `values` holds the checked profile as in `FIELDS`; `document` tells where each
    value was written."""

    name: str
    title: str
    node_types: Mapping[str, NodeType]
    partitions: Mapping[str, Partition]
    values: Mapping[str, Any]
    document: Document
    files: tuple[str, ...]

    def check_trust(self) -> None:
        """Raises Refused where a file of the profile, whose lines and commands are run, could be
        somebody else's."""
        for file in self.files:
            if not file.startswith(_SHIPPED):
                require_trust(file, "this site profile")

    def partition(self, name: str) -> Partition | None:
        """The partition of that name; on sites that list none, any name, with the default kind of
        node."""
        if name in self.partitions:
            return self.partitions[name]
        if self.partitions or not self.node_types:
            return None
        default = self.values["default_node_type"] or next(iter(self.node_types))
        return Partition(name, self.node_types[default])


def list_sites(base_dir: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, layer, path of its profile) of every profile there is; a name appears once, the
    strongest layer's."""
    seen = set()
    for label, folder in layer_dirs("site_profiles", base_dir):
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        for name in names:
            path = os.path.join(folder, name, "profile.yaml")
            if name not in seen and os.path.isfile(path):
                seen.add(name)
                yield name, label, path


def load_site(name_or_path: str, base_dir: str = "", where: str = "") -> Site:
    """The site of that name, or of the profile file or folder at that path (relative to
    `base_dir`).

    A profile with `extends: other` is laid over the other one. Raises UsageError with every problem
    at once.
    """
    layers = _layers(name_or_path, base_dir, base_dir, where, ())
    return site_from_document(merge(layers), tuple(layer.name for layer in layers))


def site_from_document(document: Document, files: tuple[str, ...] = ()) -> Site:
    """A checked Site from a merged profile document. Raises UsageError with every problem at
    once."""
    values, problems = check(document, FIELDS)
    if problems:
        raise UsageError(problems)
    node_types = {name: _node_type(name, fields) for name, fields in values["node_types"].items()}
    problems = list(_contradictions(document, values, node_types))
    if problems:
        raise UsageError(problems)
    partitions = {
        name: Partition(
            name=name,
            node_type=node_types[fields["node_type"]],
            max_time_s=fields["max_time"],
            max_time_by_nodes={int(key): s for key, s in fields["max_time_by_nodes"].items()},
            **{
                key: fields[key]
                for key in (
                    "partition",
                    "constraint",
                    "special",
                    "whole_nodes",
                    "debug",
                    "qos",
                    "max_nodes",
                    "min_nodes",
                    "max_submitted",
                    "max_running",
                    "billing",
                )
            },
        )
        for name, fields in values["partitions"].items()
    }
    return Site(values["name"], values["title"], node_types, partitions, values, document, files)


def _layers(
    name_or_path: str, base_dir: str, project: str, where: str, chain: tuple[str, ...]
) -> list[Document]:
    path = _find(name_or_path, base_dir, project, where)
    file = os.path.realpath(path)
    if file in chain:
        raise UsageError(f"profile `{name_or_path}` extends itself", where=where)
    document = load_yaml(path, name=_display(path))
    if document.data is None:
        raise UsageError("the profile is empty", where=document.name)
    parent = document.get("extends")
    if not isinstance(parent, str):
        return [document]
    if parent == document.get("name") or (os.sep not in parent and parent == name_or_path):
        # A user's `lumi` that extends `lumi` means the shipped one.
        parent_path = os.path.join(shipped_dir("site_profiles"), parent, "profile.yaml")
        below = [load_yaml(parent_path, name=_display(parent_path))] if parent_path != path else []
    else:
        below = _layers(
            parent, os.path.dirname(path), project, document.where("extends"), (*chain, file)
        )
    return [*below, document]


def _find(name_or_path: str, base_dir: str, project: str, where: str) -> str:
    if os.sep in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        path = os.path.join(base_dir, os.path.expanduser(name_or_path))
        path = os.path.join(path, "profile.yaml") if os.path.isdir(path) else path
        if not os.path.isfile(path):
            raise UsageError(f"there is no site profile at `{name_or_path}`", where=where)
        return path
    names = {}
    for name, _, path in list_sites(project):
        names[name] = path
        if name == name_or_path:
            return path
    raise UsageError(
        f"there is no site profile `{name_or_path}`", where=where, hint=nearest(name_or_path, names)
    )


def layer_name(file: str) -> str:
    """How rendered files name a profile's file: from its layer's folder on, for the rest is this
    machine's."""
    return "/".join(file.split(os.sep)[-3:])


def _display(path: str) -> str:
    """How messages call a profile: shipped ones by their place in the project, which is the same
    everywhere."""
    shipped = shipped_dir("site_profiles")
    if path.startswith(shipped + os.sep):
        return _SHIPPED + path[len(shipped) + 1 :]
    here = os.getcwd() + os.sep
    taken = path.startswith(here + _SHIPPED)
    return path[len(here) :] if path.startswith(here) and not taken else path


def _node_type(name: str, fields: Mapping[str, Any]) -> NodeType:
    return NodeType(
        name=name,
        usable_cores=fields["usable_cores"] or fields["cores"],
        gpu_vendor=fields["gpu_vendor"] or "",
        cpu_bind={int(cores): value for cores, value in fields["cpu_bind"].items()},
        tmp_path=fields["tmp"]["path"],
        tmp_kind=fields["tmp"]["kind"],
        tmp_size_gib=fields["tmp"]["size_gib"],
        **{
            key: fields[key]
            for key in (
                "sockets",
                "cores",
                "threads_per_core",
                "memory_gib",
                "gpus",
                "gpu_type",
                "gpu_memory_gib",
                "tasks_per_node",
            )
        },
    )


def _contradictions(
    document: Document, values: Mapping[str, Any], node_types: Mapping[str, NodeType]
) -> Iterator[Problem]:
    for name, fields in values["partitions"].items():
        if fields["node_type"] not in node_types:
            yield Problem(
                f"partition `{name}` names an unknown node type `{fields['node_type']}`",
                where=document.where("partitions", name, "node_type"),
                hint=nearest(fields["node_type"], node_types),
            )
        billing = fields["billing"]
        if billing and (billing["per_node_hour"] is None) == (billing["per_slice_hour"] is None):
            yield Problem(
                f"billing of `{name}` needs one of per_node_hour and per_slice_hour",
                where=document.where("partitions", name, "billing"),
            )
    for name, node in node_types.items():
        if node.usable_cores > node.cores:
            yield Problem(
                f"node type `{name}` has more usable cores ({node.usable_cores}) than cores"
                f" ({node.cores})",
                where=document.where("node_types", name, "usable_cores"),
            )
    for key in ("cpu_partition", "debug_partition"):
        wanted = values["tools"][key]
        if wanted and values["partitions"] and wanted not in values["partitions"]:
            yield Problem(
                f"tools.{key} names an unknown partition `{wanted}`",
                where=document.where("tools", key),
                hint=nearest(wanted, values["partitions"]),
            )
    for path, origin in document.origins.items():
        text = document.get(*path)
        literal = {"env", "node_dirs", "storage", "node_types", "binds"} & set(path[:2])
        if literal and path[-1] != "why" and isinstance(text, str) and "$" in text:
            yield Problem(
                f"`{text}` holds a `$`, and values of a profile are taken literally",
                where=str(origin),
                why="the job would see the dollar sign, and make a folder of that name",
                hint="write the value out; {tmp}, {user} and {job} are filled in, in node_dirs",
            )
    default = values["default_node_type"]
    if default and default not in node_types:
        yield Problem(
            f"default_node_type `{default}` is unknown", where=document.where("default_node_type")
        )
    patterns: list[tuple[tuple[Any, ...], str]] = [
        (("account", "pattern"), values["account"]["pattern"])
    ]
    patterns += [
        (("match", "hostnames", index), text)
        for index, text in enumerate(values["match"]["hostnames"])
    ]
    for path, pattern in patterns:
        if pattern and not _compiles(pattern):
            yield Problem(f"`{pattern}` is not a regular expression", where=document.where(*path))


def _compiles(pattern: str) -> bool:
    import re

    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
