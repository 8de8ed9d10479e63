"""What there is to say about site profiles: which exist, where each value comes from, and what is
wrong with one."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import HpctrainError, Problem
from hpctrain.config import run
from hpctrain.config.document import walk
from hpctrain.config.fields import Field, check
from hpctrain.config.sbatch import check_options
from hpctrain.config.site import FIELDS, NodeType, Partition, Site, list_sites, load_site
from hpctrain.config.text import flow

# Limits and modules of a site change about once a year; older facts deserve a second look.
STALE_DAYS = 365
_EPHEMERAL = 32768


@dataclass(frozen=True)
class Summary:
    """One profile in a list; `problem` says why it does not load."""

    name: str
    layer: str
    path: str
    title: str = ""
    verified: str = "never"
    maintainers: tuple[str, ...] = ()
    problem: str = ""


def summaries() -> list[Summary]:
    """Every profile there is; one that does not load is listed with its first problem."""
    found = []
    for name, layer, path in list_sites():
        try:
            site = load_site(path)
        except HpctrainError as error:
            found.append(Summary(name, layer, path, problem=error.problems[0].what))
            continue
        values = site.values
        verified = values["verified"]["date"] or "never"
        found.append(Summary(name, layer, path, site.title, verified, tuple(values["maintainers"])))
    return found


def blame(site: Site) -> list[tuple[str, Any, str]]:
    """(dotted name, value as written, file:line:column) of every value of the effective profile,
    defaults last."""
    rows = []
    for path, value in walk(site.document.data):
        inside_list = any(
            isinstance(key, int) and isinstance(site.document.get(*path[:depth]), list)
            for depth, key in enumerate(path)
        )
        if path and not inside_list and (not value or not isinstance(value, dict)):
            rows.append((_dotted(path), value, site.document.where(*path)))
    for name, value in _defaults(FIELDS, site.document.data, ()):
        rows.append((name, value, "default"))
    return rows


def value_text(value: Any) -> str:
    """A value for one column of a table."""
    text = flow(value) if isinstance(value, (bool, dict, list)) else str(value)
    if isinstance(value, list):
        text = text[1:-1]
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def check_profiles(names: Sequence[str], today: datetime.date) -> dict[str, list[Problem]]:
    """The problems of each named profile, or of all there are, whether it loads or not."""
    wanted = [(name, name) for name in names] or [(name, path) for name, _, path in list_sites()]
    found = {}
    for name, place in wanted:
        try:
            site = load_site(place)
            found[name] = find_problems(site, site.files[-1], today)
        except HpctrainError as error:
            found[name] = list(error.problems)
    return found


def find_problems(site: Site, path: str, today: datetime.date) -> list[Problem]:
    """What a loaded profile gets wrong beyond its form; errors would hurt jobs, warnings and notes
    the people who use it."""
    values, document = site.values, site.document
    found = [
        *_identity(site, path),
        *_freshness(site, today),
        *_account(site),
        *_shapes(site),
        *_environment(site),
    ]
    found += check_options(
        values["slurm"]["always"], lambda key: document.where_key("slurm", "always", key)
    )
    known = {key: _optional(field) for key, field in run.FIELDS.items()}
    defaults = values["defaults"]
    if defaults:
        found += check(document.section("defaults"), known)[1]
    if not site.partitions:
        found.append(
            Problem(
                "no partitions are listed, so no limit can be checked",
                document.where(),
                level="note",
            )
        )
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda problem: order[problem.level])


def _identity(site: Site, path: str) -> Iterator[Problem]:
    folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
    document = site.document
    if os.path.basename(path) == "profile.yaml" and folder != site.name:
        yield Problem(
            f"`name: {site.name}` is not the name of its folder, `{folder}`",
            document.where("name"),
            level="warning",
            why="runs and `hpctrain site list` know a profile by its folder",
        )
    if not site.values["maintainers"]:
        yield Problem(
            "nobody is named under `maintainers`",
            document.where("maintainers"),
            level="warning",
            hint="a name or handle of someone who answers questions about it",
        )
    if not site.values["docs_url"]:
        yield Problem("`docs_url` is missing", document.where(), level="note")


def _freshness(site: Site, today: datetime.date) -> Iterator[Problem]:
    text, where = site.values["verified"]["date"], site.document.where("verified", "date")
    if not text:
        yield Problem(
            "never verified",
            site.document.where("verified"),
            level="warning",
            hint='run a job there, then set `verified: {date: "YYYY-MM-DD", by: …, evidence: …}`',
        )
        return
    try:
        date = datetime.date.fromisoformat(text)
    except ValueError:
        yield Problem(f"`verified.date: {text}` is no day of the calendar", where)
        return
    if date > today:
        yield Problem(f"`verified.date: {text}` lies in the future", where, level="warning")
    elif (today - date).days > STALE_DAYS:
        yield Problem(
            f"last verified on {text}, {(today - date).days} days ago",
            where,
            level="warning",
            why=f"facts older than {STALE_DAYS} days are worth a second look",
            hint="compare with the site's documentation",
        )


def _account(site: Site) -> Iterator[Problem]:
    rules, document = site.values["account"], site.document
    if rules["required"] and not rules["example"]:
        yield Problem(
            "`account.required` without an `example`",
            document.where("account"),
            level="warning",
            why="messages and `hpctrain init` show it",
        )
    if (
        rules["pattern"]
        and rules["example"]
        and not re.fullmatch(rules["pattern"], rules["example"])
    ):
        yield Problem(
            f"`account.example: {rules['example']}` does not match `account.pattern`",
            document.where("account", "example"),
            why=f"the pattern is {rules['pattern']}",
        )


def _shapes(site: Site) -> Iterator[Problem]:
    for node in site.node_types.values():
        yield from _node_shape(site, node)
    used = {partition.node_type.name for partition in site.partitions.values()}
    for name in site.node_types if used else ():
        if name not in used and name != site.values["default_node_type"]:
            yield Problem(
                f"no partition has nodes of type `{name}`",
                site.document.where_key("node_types", name),
                level="note",
            )
    for partition in site.partitions.values():
        yield from _partition_limits(site, partition)
    yield from _ports(site)


def _node_shape(site: Site, node: NodeType) -> Iterator[Problem]:
    document, name = site.document, node.name
    if node.cores % node.sockets:
        yield Problem(
            f"{node.cores} cores cannot be spread evenly over {node.sockets} sockets",
            document.where("node_types", name, "sockets"),
            level="warning",
        )
    if node.threads_per_core > 1 and not site.values["slurm"]["hint"]:
        yield Problem(
            f"`{name}` has {node.threads_per_core} threads a core, and jobs ask for one CPU a core",
            document.where("node_types", name, "threads_per_core"),
            level="warning",
            why="Slurm counts threads as CPUs, so that a task gets only a part of its cores",
            hint="`slurm: {hint: nomultithread}`, unless this Slurm counts cores",
        )
    for cores, mask in node.cpu_bind.items():
        kind, _, listing = mask.partition(":")
        count = len(listing.split(",")) if listing else 0
        if kind in ("mask_cpu", "map_cpu") and node.gpus and count != node.gpus:
            yield Problem(
                f"`cpu_bind` for {cores} cores names {count} places, and a node has {node.gpus}"
                " GPUs",
                document.where("node_types", name, "cpu_bind", cores),
            )
    if node.gpus and site.values["slurm"]["gpu_request"] == "none":
        yield Problem(
            f"`{name}` has GPUs and `slurm.gpu_request` is none, so that no job gets one",
            document.where("slurm", "gpu_request"),
            level="warning",
        )
    if node.tmp_kind == "ram" and (node.tmp_size_gib or 0) > node.memory_gib:
        yield Problem(
            f"`{name}` has more {node.tmp_path} in memory than memory",
            document.where("node_types", name, "tmp"),
        )


def _partition_limits(site: Site, partition: Partition) -> Iterator[Problem]:
    document, name = site.document, partition.name
    if (partition.min_nodes or 0) > (partition.max_nodes or 10**9):
        yield Problem(
            f"partition `{name}` wants at least {partition.min_nodes} and at most"
            f" {partition.max_nodes} nodes",
            document.where("partitions", name, "min_nodes"),
        )
    if (partition.max_running or 0) > (partition.max_submitted or 10**9):
        yield Problem(
            f"partition `{name}` lets more jobs run ({partition.max_running}) than be submitted"
            f" ({partition.max_submitted})",
            document.where("partitions", name, "max_running"),
            level="warning",
        )


def _ports(site: Site) -> Iterator[Problem]:
    document, network = site.document, site.values["network"]
    last = network["port_base"] + network["port_range"] - 1
    if _EPHEMERAL <= last <= 65535:
        yield Problem(
            f"the rendezvous ports, up to {last}, may be taken by any connection of the node",
            document.where("network"),
            level="warning",
            why=f"Linux gives out ports from {_EPHEMERAL} on (net.ipv4.ip_local_port_range)",
            hint="choose port_base and port_range below that",
        )
    if last > 65535:
        yield Problem(
            "the rendezvous ports go beyond 65535",
            document.where("network"),
            why=f"port_base {network['port_base']} + port_range {network['port_range']}",
        )


def _environment(site: Site) -> Iterator[Problem]:
    values, document = site.values, site.document
    for name in values["env"]:
        if run.RESERVED_ENV.fullmatch(name):
            yield Problem(
                f"`env.{name}` is set by hpctrain or Slurm in every job",
                document.where_key("env", name),
            )
        if name in values["node_dirs"]:
            yield Problem(
                f"`{name}` is both in `env` and in `node_dirs`",
                document.where_key("node_dirs", name),
                why="the folder made on each node wins",
                level="warning",
            )
    for name, fields in values["storage"].items():
        unknown = set(re.findall(r"\{[^{}]*\}", fields["path"])) - {"{account}", "{user}"}
        if unknown:
            yield Problem(
                f"`{fields['path']}` holds {', '.join(sorted(unknown))}",
                document.where("storage", name, "path"),
                why="only {account} and {user} are filled in",
            )
    container = values["container"]
    if container["runtime"] == "none" and (
        container["binds"] or container["activate"] or container["gpu_flag"]
    ):
        yield Problem(
            "`container` has settings and no `runtime`",
            document.where("container"),
            level="warning",
        )


def _optional(field: Field) -> Field:
    clone = Field(field.kind, field.doc)
    for slot in Field.__slots__:
        setattr(clone, slot, getattr(field, slot))
    clone.required = False
    return clone


def _defaults(
    fields: Mapping[str, Field], data: Any, path: tuple[Any, ...]
) -> Iterator[tuple[str, Any]]:
    data = data if isinstance(data, dict) else {}
    for key, field in fields.items():
        if field.kind == "table" and field.fields:
            yield from _defaults(field.fields, data.get(key), (*path, key))
        elif field.kind == "map" and field.items and field.items.kind == "table":
            for name, item in (data.get(key) or {}).items():
                yield from _defaults(field.items.fields or {}, item, (*path, key, name))
        elif key not in data and field.default not in (None, ""):
            yield _dotted((*path, key)), field.default


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
